// What the attention ops share: how work is cut into tiles of queries and blocks of keys.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

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

// Neighbouring runs of a row.
struct Runs {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// Hands out the runs of stretches one by one: a stretch is neighbouring runs of a row and a group of heads,
// whose softmaxes are joined in order. A member that asks goes on with its own stretch, or takes one that
// nobody has; where there is none left it takes the last run of the one with the most to go.
class StretchQueue {
 public:
  static int64_t floats(int64_t stretches, int64_t members) {
    return (stretches * sizeof(Runs) + members * sizeof(int64_t)) / sizeof(float);
  }
  // memory: `floats` of so many, for a queue that holds no stretch yet.
  StretchQueue(float* memory, int64_t stretches, int64_t members)
      : left_(reinterpret_cast<Runs*>(memory)), own_(reinterpret_cast<int64_t*>(left_ + stretches)) {
    std::uninitialized_fill_n(own_, members, int64_t{-1});
  }
  void add(Runs stretch) { new (left_ + size_++) Runs(stretch); }

  struct Taken {
    int64_t stretch, run;
    bool is_owners;
  };
  // Asked once for every run.
  Taken take(int member) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t& own = own_[member];
    while (own < 0 || left_[own].count() == 0) {
      own = taken_ < size_ ? taken_++ : -1;
      if (own < 0) break;
    }
    if (own >= 0) return {own, left_[own].first++, true};
    Runs* most = std::max_element(left_, left_ + size_,
                                  [](const Runs& a, const Runs& b) { return a.count() < b.count(); });
    return {most - left_, --most->last, false};
  }

  // When all runs are taken: those of a stretch from here on went to others than its owner.
  int64_t end_of_owners(int64_t stretch) const { return left_[stretch].first; }

 private:
  std::mutex mutex_;
  Runs* left_;  // by stretch
  int64_t size_ = 0;
  int64_t* own_;       // by member, a stretch; -1: none
  int64_t taken_ = 0;  // stretches that have an owner
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

  int64_t most_visible() const {
    return *std::max_element(step.visible.begin() + first_row, step.visible.begin() + first_row + num_rows);
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
  int64_t stretch_runs(int64_t i) const { return ceil_div(num_runs(i), kStretches); }
  // Of a stretch of a row, which may be none.
  Runs runs_of(int64_t i, int64_t stretch) const {
    const int64_t runs = num_runs(i), size = stretch_runs(i);
    return {std::min(runs, stretch * size), std::min(runs, (stretch + 1) * size)};
  }
  // Calls use(first run, last) for the stretches of a row in order.
  template <class Use>
  void for_stretches(int64_t i, const Use& use) const {
    for (int64_t stretch = 0; stretch < kStretches; stretch++) {
      if (const Runs runs = runs_of(i, stretch); runs.count() > 0) use(runs.first, runs.last);
    }
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
    const int64_t runs = most_runs(), members = machine.team.size();
    const int64_t unit_floats = runs * partial_floats + StretchQueue::floats(kStretches, 0);
    const int64_t window =
        (machine.shared_floats - StretchQueue::floats(0, 2 * members) - kLineFloats) / (groups * unit_floats);
    // Enough for every member: each goes through the runs of its row by itself.
    if (runs == 1 || num_rows * groups >= 8 * members || window < 1) {
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
      const int64_t units = std::min(window, num_rows - first) * groups;
      // The shared space: which unit a member is prepared for, the queue's memory, and the softmaxes of runs.
      auto* prepared = reinterpret_cast<int64_t*>(machine.shared);
      std::uninitialized_fill_n(prepared, members, int64_t{-1});
      StretchQueue queue(machine.shared + StretchQueue::floats(0, members), kStretches * units, members);
      float* partials = machine.shared + whole_lines(StretchQueue::floats(kStretches * units, 2 * members));
      const auto row_of = [&](int64_t unit) { return first + unit / groups; };
      const auto partial = [&](int64_t unit, int64_t run) {
        return partials + (unit * runs + run) * partial_floats;
      };
      int64_t num_taken = 0;
      for (int64_t unit = 0; unit < units; unit++) {
        num_taken += num_runs(row_of(unit));
        for (int64_t stretch = 0; stretch < kStretches; stretch++) queue.add(runs_of(row_of(unit), stretch));
      }
      machine.team.for_each(num_taken, [&](int64_t, int member) {
        const auto [stretch, run, is_owners] = queue.take(member);
        const int64_t unit = stretch / kStretches, i = row_of(unit), group = unit % groups;
        const auto [begin, end] = runs_of(i, stretch % kStretches);
        if (std::exchange(prepared[member], unit) != unit) prepare(i, group, member);
        if (!is_owners) return attend(i, group, run, num_runs(i), partial(unit, run), member);
        const int64_t next_run = run + 1 < end ? run + 1 : num_runs(i);
        if (run == begin) return attend(i, group, run, next_run, partial(unit, run), member);
        attend(i, group, run, next_run, own(member), member);
        append(group, own(member), partial(unit, begin));
      });
      machine.team.for_each(units * join_parts, [&](int64_t part, int member) {
        const int64_t unit = part / join_parts, i = row_of(unit);
        join(
            i, unit % groups, part % join_parts, join_parts, member,
            [&](int64_t run) { return queue.end_of_owners(unit * kStretches + run / stretch_runs(i)); },
            [&](int64_t run) { return partial(unit, run); });
      });
    }
  }
};

inline SoftmaxState* states_at(float* memory) { return reinterpret_cast<SoftmaxState*>(memory); }

// fa=0 on paths whose members work alone: as many of them as the shared space has room for, each with the
// scores of a unit in a part of its own. `least`: floats that a unit needs.
class StoringMembers {
 public:
  StoringMembers(const Machine& machine, int64_t least)
      : machine_(machine),
        num_parts_(std::clamp<int64_t>(machine.shared_floats / whole_lines(least), 1, machine.team.size())),
        floats_(machine.shared_floats / num_parts_ / kLineFloats * kLineFloats) {}

  int64_t floats() const { return floats_; }  // of a part

  // Calls use(unit, scores, member) once for each unit of [0, count).
  template <class Use>
  void for_each(int64_t count, const Use& use) const {
    std::atomic<int64_t> next{0};
    machine_.team.for_each(std::min(num_parts_, count), [&](int64_t part, int member) {
      for (int64_t unit = next++; unit < count; unit = next++) {
        use(unit, machine_.shared + part * floats_, member);
      }
    });
  }

 private:
  const Machine& machine_;
  int64_t num_parts_, floats_;
};

// fa=0 on paths whose members share tiles of keys: the part of the shared space that these have, beside the
// scores of a row. Half, where the least of each fits a half.
inline int64_t tile_floats_beside_scores(int64_t shared_floats, int64_t least_tile, int64_t row_scores) {
  return std::min(std::max(shared_floats / 2, least_tile), shared_floats - row_scores);
}

// What attention_shared_floats says of the decompressed path in float32.
int64_t expanded_shared_floats(const MlaDims& dims, bool fused, int64_t keys);

}  // namespace kvfold
