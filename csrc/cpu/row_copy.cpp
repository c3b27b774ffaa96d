#include "cpu/row_copy.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efa_ep {

void copy_row(std::byte* to, const std::byte* from, size_t bytes, Caching caching) {
#if defined(__x86_64__)
  if (caching == Caching::kPast) {
    for (size_t i = 0; i < bytes; i += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    _mm_sfence();  // such stores are not ordered before a release
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace efa_ep
