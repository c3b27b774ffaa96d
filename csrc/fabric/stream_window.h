// Bounds the bytes that are on their way to a peer whose provider keeps an ordered stream to it, as TCP does.
//
// Such a provider takes whatever fits into the kernel's buffers, which are megabytes, and calls it complete.
// Bytes that lie there leave the caches before they are read, and the kernel's thread for the network falls
// behind. So one write in half a window asks for the peer's acknowledgement, which the order of the stream
// makes one for all writes before it, and nothing follows a full window until one has come.
#pragma once

#include <cstdint>

namespace efa_ep {

class StreamWindow {
 public:
  /// Whether a write of that many bytes has to wait. Never without an acknowledgement that is to come.
  bool is_full(uint64_t bytes) const {
    const bool awaits_one = unacknowledged_ > uncovered_;
    return awaits_one && unacknowledged_ + bytes > kWindowBytes;
  }

  /// Bytes that an acknowledgement of this write, which is being posted, stands for: 0 if it needs none.
  uint64_t covered_by(uint64_t bytes) const {
    const uint64_t covered = uncovered_ + bytes;
    return covered >= kWindowBytes / 2 ? covered : 0;
  }

  /// The write was posted, with what covered_by() said.
  void posted(uint64_t bytes, uint64_t covered) {
    unacknowledged_ += bytes;
    uncovered_ = covered > 0 ? 0 : uncovered_ + bytes;
  }

  /// It is complete: the peer has acknowledged what it covered.
  void completed(uint64_t covered) { unacknowledged_ -= covered; }

  /// Half of it is what 40 Gb/s have under way in 100 us. Less of it is better for the caches, and costs more
  /// acknowledgements.
  static constexpr uint64_t kWindowBytes = 1 << 20;

 private:
  uint64_t unacknowledged_ = 0;  ///< posted, and no acknowledgement has come
  uint64_t uncovered_ = 0;       ///< posted since the last write that asked for one
};

}  // namespace efa_ep
