/* Strips of a matrix: up to 32 rows of it, made bfloat16 from left to right, 64 columns at a time.

   Every order of summation reads strips, so a stored form is known here and nowhere else. */

#pragma once

#include "bfloat16.h"
#include "forms/compressed.h"
#include "forms/bytes.h"
#include "forms/gguf.h"
#include "forms/nibbles.h"
#include "stored_matrix.h"

#include <stdlib.h>

enum { STRIP_ROWS = BLOCK_ROWS, CHUNK = SEGMENT_COLUMNS, CHUNK_WEIGHTS = STRIP_ROWS * CHUNK };

struct strip {
    const struct stored_matrix *m;
    int64_t row, rows;
    const uint16_t *bias;          /* of these rows, added before a sum is rounded; NULL for none */
    struct compressed_block block; /* of a compressed matrix; its other exponents are used up from left to right */
};

static inline struct strip begin_strip(const struct stored_matrix *m, int64_t row, const uint16_t *bias) {
    struct strip s = {m, row, m->rows - row < STRIP_ROWS ? m->rows - row : STRIP_ROWS, bias ? bias + row : NULL, {0}};
    if (m->form == COMPRESSED) s.block = compressed_block(m->part[0], m->rows, m->columns, row / STRIP_ROWS);
    return s;
}

static inline const uint16_t *plain_row(const struct strip *s, int64_t row) {
    return (const uint16_t *)s->m->part[0] + (s->row + row) * s->m->columns;
}

/* What is stored for a sum. */
static inline uint16_t finish(const struct strip *s, int64_t row, float sum) {
    return round_bf16(s->bias ? sum + load_bf16(s->bias[row]) : sum);
}

static inline int64_t chunk_columns(const struct strip *s, int64_t column) {
    return s->m->columns - column < CHUNK ? s->m->columns - column : CHUNK;
}

/* Rows `begin` to `end` - 1 of the chunk that begins at `column`, with zeros beyond the matrix. Chunks are asked for from left
   to right, and the rows of a chunk from top to bottom. */
static inline void expand_chunk(struct strip *s, int64_t column, int begin, int end, uint16_t *room, int64_t stride) {
    if (s->m->form == COMPRESSED) {
        const uint8_t *segment = s->block.segments + column / SEGMENT_COLUMNS * SEGMENT_BYTES;
        s->block.others = expand_rows(segment, s->block.head, s->block.others, begin, end, room, stride);
        return;
    }
    int64_t columns = chunk_columns(s, column), rows = (s->rows < end ? s->rows : end) - begin;
    if (s->m->form == NIBBLES && rows > 0)
        expand_nibbles(s->m, s->row + begin, rows, column, columns, room + begin * stride, stride);
    else if (s->m->form == BYTES && rows > 0)
        expand_bytes(s->m, s->row + begin, rows, column, columns, room + begin * stride, stride);
    if (s->m->form != PLAIN && columns == CHUNK && rows == end - begin) return;
    size_t bytes = (size_t)columns * sizeof(uint16_t);
    for (int64_t row = begin; row < end; row++) {
        uint8_t *target = (uint8_t *)(room + row * stride);
        size_t found = row < s->rows ? bytes : 0;
        if (found && s->m->form == PLAIN) memcpy(target, plain_row(s, row) + column, found);
        memset(target + found, 0, CHUNK * sizeof(uint16_t) - found);
    }
}

/* Blocks of GGUF have up to 256 columns, and are expanded as a whole: four chunks at a time. */
enum { WIDE = GGUF_LARGE };

static inline int is_wide(const struct strip *s) { return s->m->form == GGUF; }

/* All rows of the columns from `column` on, at most WIDE. */
static inline void expand_wide(struct strip *s, int64_t column, uint16_t *room, int64_t stride) {
    int64_t columns = s->m->columns - column < WIDE ? s->m->columns - column : WIDE;
    gguf_expander_of(s->m->parameter[0])(s->m, s->row, s->rows, column, columns, room, stride);
    for (int64_t row = 0; row < STRIP_ROWS; row++)
        for (int64_t c = row < s->rows ? columns : 0; c < (columns + CHUNK - 1) / CHUNK * CHUNK; c++) room[row * stride + c] = 0;
}

/* A whole strip, with zeros up to a multiple of CHUNK columns. */
static inline void expand_strip(struct strip *s, uint16_t *room, int64_t stride) {
    for (int64_t c = 0; c < s->m->columns; c += is_wide(s) ? WIDE : CHUNK)
        is_wide(s) ? expand_wide(s, c, room + c, stride) : expand_chunk(s, c, 0, STRIP_ROWS, room + c, stride);
}

/* What one thread computes in: rooms for expanded weights and for sums. */
struct room {
    uint16_t chunk[2][CHUNK_WEIGHTS] __attribute__((aligned(64)));
    uint16_t wide[STRIP_ROWS * WIDE] __attribute__((aligned(64)));
    uint32_t pairs[CHUNK / 2 * STRIP_ROWS] __attribute__((aligned(64)));
    float *sums;     /* as many as an order of summation keeps between chunks */
    uint16_t *strip; /* a whole strip, where each row is multiplied several times */
};

/* Where a whole chunk can be read: in the matrix itself if it is plain and nothing of the chunk lies beyond it, else in a room. */
static inline const uint16_t *read_chunk(struct strip *s, int64_t column, struct room *room, int64_t *stride) {
    if (s->m->form == PLAIN && s->rows == STRIP_ROWS && chunk_columns(s, column) == CHUNK) {
        *stride = s->m->columns;
        return plain_row(s, 0) + column;
    }
    if (is_wide(s)) {
        *stride = WIDE;
        if (column % WIDE == 0) expand_wide(s, column, room->wide, WIDE);
        return room->wide + column % WIDE;
    }
    *stride = CHUNK;
    expand_chunk(s, column, 0, STRIP_ROWS, room->chunk[0], CHUNK);
    return room->chunk[0];
}
