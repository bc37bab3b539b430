/* Compressing weights of bfloat16; compression.py says how they lie in memory. */

#include "forms/compressed.h"

enum { EXPONENTS = 256, UNKNOWN = 255 };

static inline int exponent_of(uint16_t weight) { return weight >> 7 & 0xff; }

/* The seven exponents that a block has most of; 255 (infinities, NaN) never gets a code. Gives how many weights have another. */
static uint32_t choose_exponents(const uint16_t *w, int64_t columns, uint8_t *chosen) {
    uint32_t count[EXPONENTS] = {0}, others = (uint32_t)(BLOCK_ROWS * columns);
    for (int64_t i = 0; i < BLOCK_ROWS * columns; i++) count[exponent_of(w[i])]++;
    for (int code = 0; code < ANOTHER; code++) {
        int most = 0;
        for (int exponent = 1; exponent < UNKNOWN; exponent++)
            if (count[exponent] > count[most]) most = exponent;
        chosen[code] = (uint8_t)most;
        others -= count[most];
        count[most] = 0;
    }
    chosen[ANOTHER] = UNKNOWN;
    return others;
}

static void write_block(const uint16_t *w, int64_t columns, const struct block_head *head, uint8_t *segments, uint8_t *others) {
    uint8_t code_of[EXPONENTS];
    memset(code_of, ANOTHER, sizeof code_of);
    for (int code = ANOTHER - 1; code >= 0; code--) code_of[head->exponents[code]] = (uint8_t)code;
    for (int64_t s = 0; s < columns / SEGMENT_COLUMNS; s++, segments += SEGMENT_BYTES)
        for (int row = 0; row < BLOCK_ROWS; row++)
            for (int group = 0; group < 8; group++) {
                const uint16_t *from = w + row * columns + s * SEGMENT_COLUMNS + group_column(group);
                uint8_t *rest = segments + row * SEGMENT_COLUMNS + group * 8;
                uint8_t *packed = segments + SEGMENT_CODES + row * ROW_CODE_BYTES + group * 3;
                uint32_t codes = 0;
                for (int j = 0; j < 8; j++) {
                    int exponent = exponent_of(from[j]), code = code_of[exponent];
                    rest[j] = (uint8_t)((from[j] >> 8 & 0x80) | (from[j] & 0x7f));
                    codes |= (uint32_t)code << 3 * j;
                    if (code == ANOTHER) *others++ = (uint8_t)exponent;
                }
                packed[0] = (uint8_t)codes, packed[1] = (uint8_t)(codes >> 8), packed[2] = (uint8_t)(codes >> 16);
            }
}

/* Write heads and segments to `out`, which is zero, and the exponents without a code, which will stand `others_at` bytes after
   `out`, to `others`; gives how many those are. */
int64_t expertier_compress(const uint16_t *w, int64_t rows, int64_t columns, int64_t others_at, uint8_t *out, uint8_t *others) {
    struct block_head *heads = (struct block_head *)out;
    int64_t blocks = rows / BLOCK_ROWS, total = 0;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < blocks; i++)
        heads[i].others = choose_exponents(w + i * BLOCK_ROWS * columns, columns, heads[i].exponents);
    for (int64_t i = 0; i < blocks; i++) {
        uint32_t count = heads[i].others;
        heads[i].others = (uint32_t)(others_at + total);
        total += count;
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < blocks; i++) {
        struct compressed_block at = compressed_block(out, rows, columns, i);
        write_block(w + i * BLOCK_ROWS * columns, columns, at.head, (uint8_t *)at.segments, others + at.head->others - others_at);
    }
    return total;
}
