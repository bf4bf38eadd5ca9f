// What the attention ops share: how work is cut into tiles of queries and blocks of keys.

#pragma once

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/mla_up.h"
#include "kernels/softmax_tile.h"
#include "kernels/step_view.h"

namespace kvfold {

constexpr int64_t kScoreFloats = kTileQueries * kPageTokens;
constexpr int64_t kStateFloats = kTileQueries * sizeof(SoftmaxState) / sizeof(float);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls use(first_key, keys) for blocks of [first, last), `first` at a page: pages, or whole numbers of them.
template <typename Use>
void for_blocks(int64_t first, int64_t last, const Use& use, int64_t block = kPageTokens) {
  for (int64_t key = first; key < last; key += block) use(key, std::min(block, last - key));
}

// A sequence of a step: its rows, and the keys that the last of them sees.
struct SequenceRows {
  int32_t sequence;
  int64_t first_row, rows, num_keys;
};

// Calls use(SequenceRows) for the sequences of a range, in order.
template <typename Use>
void for_sequences(const Step& step, const PathRange& range, const Use& use) {
  for (int32_t s = range.first_sequence; s < range.last_sequence; s++) {
    use(SequenceRows{s, step.row_starts[s], step.row_starts[s + 1] - step.row_starts[s], step.kv_lens[s]});
  }
}

// Keys of a run of absorbed ones, by the keys that a row sees alone.
//
// 256 keys: a unit is then at least 256 * 16 heads * 1088 = 4.5 M multiply-adds. Of fewer than 1024 keys a
// quarter, whole pages, so that a second thread has work. Of many keys a sixteenth, up to 512 (what a run is
// joined with leaves the caches: at 8192 keys runs of 512 are 8 % faster than of 256), and no more than 64
// runs. More keys may be fewer runs: 512 pages are 64 runs of 8, 513 are 57 of 9.
inline int64_t absorbed_run_keys(int64_t num_keys) {
  constexpr int64_t kFewPages = 4, kManyPages = 8;
  const int64_t pages = ceil_div(num_keys, kPageTokens);
  const int64_t few = std::min(kFewPages, ceil_div(pages, 4)),
                many = std::min(kManyPages, ceil_div(pages, 16));
  return std::max({few, many, ceil_div(pages, 64)}) * kPageTokens;
}

// Neighbouring runs of a row and a group of heads, whose softmaxes are joined in order.
struct Stretch {
  int64_t row, group, first, last;
};

// Hands out runs one by one. A member that asks goes on with its own stretch, or takes one that nobody has;
// where there is none left it takes the last run of the one with the most to go.
class StretchQueue {
 public:
  StretchQueue(std::vector<Stretch> stretches, int members)
      : stretches_(std::move(stretches)), own_(members, -1) {
    for (const Stretch& stretch : stretches_) left_.push_back({stretch.first, stretch.last});
  }

  struct Taken {
    int64_t stretch, run;
    bool is_owners;
  };
  // Asked once for every run.
  Taken take(int member) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t& own = own_[member];
    if (own < 0 || left_[own].count() == 0) own = taken_ < size() ? taken_++ : -1;
    if (own >= 0) return {own, left_[own].first++, true};
    const auto most = std::max_element(left_.begin(), left_.end(),
                                       [](const Left& a, const Left& b) { return a.count() < b.count(); });
    return {most - left_.begin(), --most->last, false};
  }

  int64_t size() const { return static_cast<int64_t>(stretches_.size()); }
  const Stretch& operator[](int64_t stretch) const { return stretches_[stretch]; }
  // When all runs are taken: those of a stretch from here on went to others than its owner.
  int64_t end_of_owners(int64_t stretch) const { return left_[stretch].first; }

 private:
  struct Left {
    int64_t first, last;
    int64_t count() const { return last - first; }
  };
  std::mutex mutex_;
  std::vector<Stretch> stretches_;
  std::vector<Left> left_;
  std::vector<int64_t> own_;  // by member; -1: none
  int64_t taken_ = 0;         // stretches that have an owner
};

// Rows of the absorbed range. The pages of a row go in runs, each with a softmax of its own. These are joined
// in an order that is a function of the keys it sees alone: of each stretch of neighbours, then of stretches.
struct AbsorbedRows {
  const Step& step;
  int64_t first_row;  // of the range: where q and out start
  int64_t num_rows;

  int64_t visible(int64_t i) const { return step.visible[first_row + i]; }
  int32_t page(int64_t i, int64_t key) const {
    return step.page_list(step.sequence_of[first_row + i])[key / kPageTokens];
  }

  int64_t run_keys(int64_t i) const { return absorbed_run_keys(visible(i)); }
  int64_t num_runs(int64_t i) const { return ceil_div(visible(i), run_keys(i)); }
  int64_t most_runs() const {
    int64_t most = 0;
    for (int64_t i = 0; i < num_rows; i++) most = std::max(most, num_runs(i));
    return most;
  }
  // Calls use(first key, keys) for the pages of a run, or for `block` keys at a time.
  template <class Use>
  void for_pages(int64_t i, int64_t run, const Use& use, int64_t block = kPageTokens) const {
    for_blocks(run * run_keys(i), std::min(visible(i), (run + 1) * run_keys(i)), use, block);
  }

  // Of a row. Two: a member each of two goes through its own, and what a run hands to the next is still near;
  // what stretches hand over, 33 KB of 16 heads, has left the caches since the layer before wrote there.
  static constexpr int64_t kStretches = 2;
  // Calls use(first run, last) for the stretches of a row in order.
  template <class Use>
  void for_stretches(int64_t i, const Use& use) const {
    const int64_t runs = num_runs(i), size = ceil_div(runs, kStretches);
    for (int64_t first = 0; first < runs; first += size) use(first, std::min(runs, first + size));
  }

  // The softmaxes of all rows and `groups` of heads, with the work of each spread as there are many or few:
  //   prepare(i, group, member)                before a member attends to runs of it
  //   attend(i, group, run, next_run, partial, member)
  //                                            a run's softmax into partial_floats; next_run: of the row,
  //                                            which the member most likely takes next, where there is one
  //   append(group, from, into)                joins the softmax of a run with that of those before it in its
  //                                            stretch
  //   join(i, group, part, parts, member, end_of_first, next)
  //                                            joins a part of the runs next(0), next(1) ... of a row: there
  //                                            are join_parts, or one where a member goes through the runs by
  //                                            itself. Runs of a stretch before end_of_first(its first) are
  //                                            in the softmax of that one.
  // own(member): partial_floats of a member.
  template <class Own, class Prepare, class Attend, class Append, class Join>
  void for_runs(const Machine& machine, int64_t groups, int64_t partial_floats, int64_t join_parts,
                const Own& own, const Prepare& prepare, const Attend& attend, const Append& append,
                const Join& join) const {
    const int64_t runs = most_runs(), window = machine.shared_floats / (runs * groups * partial_floats);
    // Enough for every member: each goes through the runs of its row by itself.
    if (runs == 1 || num_rows * groups >= 8 * machine.team.size() || window == 0) {
      machine.team.for_each(num_rows * groups, [&](int64_t unit, int member) {
        const int64_t i = unit / groups, group = unit % groups;
        prepare(i, group, member);
        join(
            i, group, 0, 1, member, [](int64_t run) { return run + 1; },
            [&](int64_t run) {
              attend(i, group, run, run + 1, own(member), member);
              return own(member);
            });
      });
      return;
    }
    for (int64_t first = 0; first < num_rows; first += window) {
      const int64_t n = std::min(window, num_rows - first);
      const auto partial = [&](int64_t i, int64_t group, int64_t run) {
        return machine.shared + (((i - first) * groups + group) * runs + run) * partial_floats;
      };
      std::vector<Stretch> stretches;
      std::vector<int64_t> stretch_of(n * groups * runs);  // of each first run
      int64_t num_taken = 0;
      for (int64_t i = first; i < first + n; i++) {
        for (int64_t group = 0; group < groups; group++, num_taken += num_runs(i)) {
          for_stretches(i, [&](int64_t begin, int64_t end) {
            stretch_of[((i - first) * groups + group) * runs + begin] =
                static_cast<int64_t>(stretches.size());
            stretches.push_back({i, group, begin, end});
          });
        }
      }
      StretchQueue queue(std::move(stretches), machine.team.size());
      std::vector<std::pair<int64_t, int64_t>> prepared(machine.team.size(), {-1, -1});
      machine.team.for_each(num_taken, [&](int64_t, int member) {
        const auto [stretch, run, is_owners] = queue.take(member);
        const auto& [i, group, begin, end] = queue[stretch];
        if (std::exchange(prepared[member], {i, group}) != std::pair(i, group)) prepare(i, group, member);
        if (!is_owners) return attend(i, group, run, num_runs(i), partial(i, group, run), member);
        const int64_t next_run = run + 1 < end ? run + 1 : num_runs(i);
        if (run == begin) return attend(i, group, run, next_run, partial(i, group, run), member);
        attend(i, group, run, next_run, own(member), member);
        append(group, own(member), partial(i, group, begin));
      });
      machine.team.for_each(n * groups * join_parts, [&](int64_t unit, int member) {
        const int64_t i = first + unit / (groups * join_parts), group = unit / join_parts % groups;
        join(
            i, group, unit % join_parts, join_parts, member,
            [&](int64_t run) {
              return queue.end_of_owners(stretch_of[((i - first) * groups + group) * runs + run]);
            },
            [&](int64_t run) { return partial(i, group, run); });
      });
    }
  }
};

inline SoftmaxState* states_at(float* memory) { return reinterpret_cast<SoftmaxState*>(memory); }

// Scores that a member may store without fusing.
inline int64_t stored_floats(const Machine& machine) { return machine.shared_floats / machine.team.size(); }

// Throws WorkspaceTooSmall where a sequence's smallest expanded tiles do not fit the shared space.
void check_expanded_fits(const Machine& machine, const MlaDims& dims, int64_t rows, int64_t keys, bool fused);

}  // namespace kvfold
