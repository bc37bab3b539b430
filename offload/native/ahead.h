/* What is asked for before it is read.

   A processor follows only a few streams by itself, and a strip has 32 rows. So each row of a span asks for its next span, and for a
   piece of the next strip in the order of addresses, which the processor does follow. Between the rows, because a processor waits
   when many are asked for at once. Scales, which are few, are asked for a strip ahead. (MXFP4 in the third cache, one core of a Xeon
   with AMX: 4.0 GB/s without, 7.9 asked for together, 9.1 so.) */

#pragma once

#include <stdint.h>

enum { LINE_BYTES = 64 };

struct ahead {
    const uint8_t *next_strip, *next_scales;
    int64_t span_bytes, scale_bytes; /* of one row of a span */
};

/* Where nothing comes after the codes of these rows. */
static inline struct ahead nothing_ahead(const uint8_t *codes) { return (struct ahead){codes, codes, 0, 0}; }

/* With the codes of a row that are read now, which take so many lines of the cache. */
static inline __attribute__((always_inline)) void ask_ahead(struct ahead *ahead, const uint8_t *codes, const int lines) {
#pragma GCC unroll 4
    for (int line = 0; line < lines; line++) {
        __builtin_prefetch(codes + ahead->span_bytes + line * LINE_BYTES, 0, 3);
        __builtin_prefetch(ahead->next_strip + line * LINE_BYTES, 0, 2);
    }
    __builtin_prefetch(ahead->next_scales, 0, 3);
    ahead->next_strip += ahead->span_bytes;
    ahead->next_scales += ahead->scale_bytes;
}
