/* Strips of a matrix: up to 32 rows of it, made bfloat16 from left to right, a span of columns at a time.

   Orders of summation read strips, so a stored form is known here and nowhere else; but orders/integers.h, which has no numbers to
   read, knows codes of few bits. */

#pragma once

#include "ahead.h"
#include "bfloat16.h"
#include "forms/blocks.h"
#include "forms/compressed.h"
#include "forms/bytes.h"
#include "forms/few_bits.h"
#include "forms/gguf.h"
#include "forms/nibbles.h"
#include "forms/ternary.h"
#include "stored_matrix.h"

#include <stdlib.h>

enum { STRIP_ROWS = BLOCK_ROWS, CHUNK = SEGMENT_COLUMNS, MOST_SPAN = GGUF_LARGE };

struct strip {
    const struct stored_matrix *m;
    int kind; /* of `kind_of` */
    int64_t row, rows;
    const uint16_t *bias;          /* of these rows, added before a sum is rounded; NULL for none */
    struct compressed_block block; /* of a compressed matrix; its other exponents are used up from left to right */
    const uint8_t *codes;          /* of a quantised matrix: those of the first row */
    int64_t row_bytes, span_bytes; /* of codes, of one row */
    const uint8_t *next_scales;    /* of the next strip */
    int64_t scale_bytes;           /* of one row of a span */
    struct ternary_row ternary[STRIP_ROWS];
#ifdef HAS_QUICK_BYTES
    struct byte_span bytes; /* the span that is being expanded */
#endif
#ifdef HAS_QUICK_NIBBLES
    const struct byte_table *tables; /* of nibbles with exponents, else NULL */
    struct nibble_span nibbles;      /* of others: the span that is being expanded */
#endif
};

/* What the compiler makes functions of: the stored forms, and for codes of few bits one for each number of bits and planes. */
enum { FEW_KINDS = 32, THREE_BITS = FEW_KINDS + MOST_PLANES + 1 };

static inline int kind_of(const struct stored_matrix *m) {
    return m->form != FEW_BITS ? m->form : code_bits(m) == 3 ? THREE_BITS : FEW_KINDS + num_planes(m);
}

static inline int is_few(int kind) { return kind >= FEW_KINDS; }

/* `call` with KIND, which the compiler knows, for what `kind` is. */
#define WITH_KIND_OF(kind, call)                                        \
    switch (kind) {                                                     \
    case PLAIN: { enum { KIND = PLAIN }; call; } break;                 \
    case COMPRESSED: { enum { KIND = COMPRESSED }; call; } break;       \
    case NIBBLES: { enum { KIND = NIBBLES }; call; } break;             \
    case BYTES: { enum { KIND = BYTES }; call; } break;                 \
    case BLOCKS: { enum { KIND = BLOCKS }; call; } break;               \
    case TERNARY: { enum { KIND = TERNARY }; call; } break;             \
    case FEW_KINDS: { enum { KIND = FEW_KINDS }; call; } break;         \
    case FEW_KINDS + 1: { enum { KIND = FEW_KINDS + 1 }; call; } break; \
    case FEW_KINDS + 2: { enum { KIND = FEW_KINDS + 2 }; call; } break; \
    case FEW_KINDS + 3: { enum { KIND = FEW_KINDS + 3 }; call; } break; \
    case THREE_BITS: { enum { KIND = THREE_BITS }; call; } break;       \
    default: { enum { KIND = GGUF }; call; }                            \
    }

/* Columns that are expanded at a time: a segment of compressed weights, a line of the cache of codes of two or four bits, two of codes
   of eight bits, the largest block of GGUF; many of ternary runs, whose first and last take longest. */
static inline int64_t span_of(int kind) {
    if (kind == GGUF || kind == TERNARY || is_few(kind)) return MOST_SPAN;
    return kind == PLAIN || kind == COMPRESSED ? CHUNK : 2 * CHUNK;
}

/* Bytes of the codes of one row of a span. */
static inline int64_t span_bytes_of(const struct stored_matrix *m, int kind) {
    switch (kind) {
    case GGUF: return gguf_row_bytes(m->parameter[0], MOST_SPAN);
    case NIBBLES: return CHUNK;
    default: return is_few(kind) ? MOST_SPAN * code_bits(m) / 8 : 2 * CHUNK;
    }
}

static inline struct strip begin_strip(const struct stored_matrix *m, int64_t row, const uint16_t *bias) {
    struct strip s = {m, kind_of(m), row, m->rows - row < STRIP_ROWS ? m->rows - row : STRIP_ROWS, bias ? bias + row : NULL};
    if (m->form == COMPRESSED) s.block = compressed_block(m->part[0], m->rows, m->columns, row / STRIP_ROWS);
    for (int64_t r = 0; m->form == TERNARY && r < s.rows; r++) s.ternary[r] = ternary_row(m, row + r);
    if (m->form == COMPRESSED || m->form == PLAIN || m->form == TERNARY) return s;
    s.row_bytes = m->form == GGUF ? gguf_row_bytes(m->parameter[0], m->columns) : m->row_bytes;
    s.span_bytes = span_bytes_of(m, s.kind);
    s.codes = m->part[CODES] + row * s.row_bytes;
    s.next_scales = s.codes;
    if (m->form == BLOCKS) return s;
    if (m->form != GGUF && m->parameter[GROUP_ROWS] == 1 && m->parameter[GROUP_COLUMNS] <= span_of(s.kind)) {
        s.next_scales = m->part[SCALES] + (row + STRIP_ROWS) * m->across * scale_size(m);
        s.scale_bytes = span_of(s.kind) / m->parameter[GROUP_COLUMNS] * scale_size(m);
    }
#ifdef HAS_QUICK_NIBBLES
    if (m->form == NIBBLES) s.tables = exponent_tables(m);
#endif
    return s;
}

static inline const uint16_t *plain_row(const struct strip *s, int64_t row) {
    return (const uint16_t *)s->m->part[0] + (s->row + row) * s->m->columns;
}

/* What is stored for a sum. */
static inline uint16_t finish(const struct strip *s, int64_t row, float sum) {
    return round_bf16(s->bias ? sum + load_bf16(s->bias[row]) : sum);
}

/* --- spans --------------------------------------------------------------------------------------------------------- */

static inline struct ahead ahead_of(const struct strip *s, const int kind, int64_t column, int begin) {
    int64_t bytes = kind == NIBBLES ? CHUNK : kind == BYTES ? 2 * CHUNK : s->span_bytes, piece = column / span_of(kind) * STRIP_ROWS + begin;
    const uint8_t *next_strip = s->codes + STRIP_ROWS * s->row_bytes;
    return (struct ahead){next_strip + piece * bytes, s->next_scales + piece * s->scale_bytes, bytes, s->scale_bytes};
}

/* Fill what a span has beyond the matrix with zeros: rows from `rows` to `end` - 1, columns up to a multiple of CHUNK. */
static inline void fill_span(uint16_t *room, int64_t stride, int64_t columns, int64_t begin, int64_t rows, int64_t end) {
    int64_t padded = (columns + CHUNK - 1) / CHUNK * CHUNK;
    for (int64_t row = begin; row < end; row++) {
        int64_t from = row < rows ? columns : 0;
        memset(room + row * stride + from, 0, (size_t)(padded - from) * sizeof *room);
    }
}

/* What is the same for all rows of a span is found with its first row. */
static inline __attribute__((always_inline)) void expand_nibbles_of(struct strip *s, int begin, int64_t rows, int64_t column, int64_t columns,
                                                                    uint16_t *out, int64_t stride, struct ahead ahead) {
#ifdef HAS_QUICK_NIBBLES
    if (s->tables && columns == QUICK_COLUMNS) {
        exponent_rows(s->m, s->tables, s->row + begin, rows, column, QUICK_COLUMNS / WORDS, out, stride, ahead);
        return;
    }
    if (!s->tables && begin == 0) s->nibbles = nibble_span(s->m, column, columns);
    if (!s->tables && s->nibbles.per && s->nibbles.count * WORDS == columns) {
        expand_nibble_span(s->m, &s->nibbles, s->row + begin, rows, out, stride, ahead);
        return;
    }
#endif
    expand_nibbles(s->m, s->row + begin, rows, column, columns, out, stride);
}

static inline __attribute__((always_inline)) void expand_bytes_of(struct strip *s, int begin, int64_t rows, int64_t column, int64_t columns,
                                                                  uint16_t *out, int64_t stride, struct ahead ahead) {
#ifdef HAS_QUICK_BYTES
    if (begin == 0) s->bytes = byte_span(s->m, column, columns);
    if (s->bytes.columns == columns) {
        expand_byte_span(s->m, &s->bytes, s->row + begin, rows, out, stride, ahead);
        return;
    }
#endif
    expand_bytes(s->m, s->row + begin, rows, column, columns, out, stride);
}

/* Rows `begin` to `end` - 1 of the span that begins at `column`, of a matrix of one `kind`. Spans are asked for from left to right, and
   the rows of a span from top to bottom. */
static inline __attribute__((always_inline)) void expand_span_of(struct strip *s, const int kind, int64_t column, int begin, int end,
                                                                 uint16_t *room, int64_t stride) {
    if (kind == COMPRESSED) {
        const uint8_t *segment = s->block.segments + column / SEGMENT_COLUMNS * SEGMENT_BYTES;
        s->block.others = expand_rows(segment, s->block.head, s->block.others, begin, end, room, stride);
        return;
    }
    int64_t span = span_of(kind), left = s->m->columns - column, columns = left < span ? left : span;
    int64_t rows = (s->rows < end ? s->rows : end) - begin;
    if (rows > 0) {
        uint16_t *out = room + begin * stride;
        struct ahead ahead = ahead_of(s, kind, column, begin);
        if (kind == NIBBLES)
            expand_nibbles_of(s, begin, rows, column, columns, out, stride, ahead);
        else if (kind == BYTES)
            expand_bytes_of(s, begin, rows, column, columns, out, stride, ahead);
        else if (is_few(kind))
            expand_few_span(s->m, kind == THREE_BITS ? 3 : 2, kind == THREE_BITS ? 0 : kind - FEW_KINDS, s->row + begin, rows, column, columns,
                            out, stride, ahead);
        else if (kind == BLOCKS)
            expand_blocks(s->m, s->row + begin, rows, column, columns, out, stride);
        else if (kind == TERNARY)
            for (int64_t r = 0; r < rows; r++)
                ternary_columns(s->ternary + begin + r, (const uint64_t *)s->m->part[TERNARY_DICTIONARY], columns, out + r * stride);
        else if (kind == GGUF)
            gguf_expander_of(s->m->parameter[0])(s->m, s->row + begin, rows, column, columns, out, stride, ahead);
        else
            for (int64_t row = 0; row < rows; row++)
                memcpy(out + row * stride, plain_row(s, begin + row) + column, (size_t)columns * sizeof *out);
    }
    if (columns % CHUNK || rows < end - begin) fill_span(room, stride, columns, begin, s->rows, end);
}

/* A whole span, whatever its kind. */
static void expand_span(struct strip *s, int64_t column, uint16_t *room, int64_t stride) {
    WITH_KIND_OF(s->kind, expand_span_of(s, KIND, column, 0, STRIP_ROWS, room, stride));
}

/* A whole strip, with zeros up to a multiple of CHUNK columns. Rows of ternary runs are read at once, as their runs end anywhere. */
static inline void expand_strip(struct strip *s, uint16_t *room, int64_t stride) {
    const int64_t columns = s->m->columns;
    if (s->kind != TERNARY) {
        for (int64_t c = 0; c < columns; c += span_of(s->kind)) expand_span(s, c, room + c, stride);
        return;
    }
    for (int64_t r = 0; r < s->rows; r++)
        ternary_columns(s->ternary + r, (const uint64_t *)s->m->part[TERNARY_DICTIONARY], columns, room + r * stride);
    fill_span(room, stride, columns, 0, s->rows, STRIP_ROWS);
}

/* What one thread computes in: rooms for expanded weights and for sums. */
struct room {
    uint16_t span[2][STRIP_ROWS * MOST_SPAN] __attribute__((aligned(64)));
    uint32_t pairs[CHUNK / 2 * STRIP_ROWS] __attribute__((aligned(64)));
    float *sums;     /* as many as an order of summation keeps between chunks */
    uint16_t *strip; /* a whole strip, where each row is multiplied several times */
};

/* Where the CHUNK columns from `column` on can be read: in the matrix itself if it is plain and nothing of them lies beyond it, else
   in a room. Chunks are asked for from left to right. */
static inline const uint16_t *read_chunk(struct strip *s, int64_t column, struct room *room, int64_t *stride) {
    if (s->m->form == PLAIN && s->rows == STRIP_ROWS && s->m->columns - column >= CHUNK) {
        *stride = s->m->columns;
        return plain_row(s, 0) + column;
    }
    *stride = span_of(s->kind);
    if (column % *stride == 0) expand_span(s, column, room->span[0], *stride);
    return room->span[0] + column % *stride;
}
