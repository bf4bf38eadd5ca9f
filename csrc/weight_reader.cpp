#include "weight_reader.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "kernels/side_by_side.h"

namespace kvfold {
namespace {

// Rows that are read before they are put in order: they fit a second-level cache of 512 KiB with what they
// become.
constexpr int64_t kStagedBytes = 128 << 10;

int64_t read_all(int descriptor, int64_t start, int64_t size, uint8_t* to) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t got = pread(descriptor, to + done, static_cast<size_t>(size - done), start + done);
    if (got == 0) break;
    if (got > 0) done += got;
    if (got < 0 && errno != EINTR) return -1;
  }
  return done;
}

}  // namespace

int64_t read_weights(int descriptor, int64_t start, int64_t size, uint8_t* to, int32_t type_id,
                     int64_t row_bytes) {
  if (row_bytes == 0) return read_all(descriptor, start, size, to);
  const int64_t group = kRowsSideBySide * row_bytes;
  std::vector<uint8_t> staged(std::max<int64_t>(1, kStagedBytes / group) * group);
  int64_t done = 0;
  while (done < size) {
    const int64_t wanted = std::min<int64_t>(staged.size(), size - done);
    const int64_t got = read_all(descriptor, start + done, wanted, staged.data());
    if (got < 0) return got;
    if (got == wanted) put_side_by_side(type_id, staged.data(), got / row_bytes, row_bytes, to + done);
    done += got;
    if (got < wanted) break;
  }
  return done;
}

}  // namespace kvfold
