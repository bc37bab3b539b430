/* A quantised matrix as it lies in memory, and what its numbers mean. codes/expander.py fills the struct;
   codes/encoding.py and codes/decode.py define every field. */

#pragma once

#include <stdint.h>

enum stored_form { PLAIN, COMPRESSED, NIBBLES, BYTES, GGUF, FEW_BITS, BLOCKS, TERNARY };

enum { MOST_PLANES = 3, MOST_LEVELS = 8, PARTS = MOST_LEVELS, PARAMETERS = 4 };

enum { CODES, SCALES, ZEROS, GLOBAL, PLANES };

/* `parameter` of GGUF is the number of its type, of blocks the ranks of a level. Of the others it is group rows, group columns (both at least 1), the kind of codes, and the fields of `enum detail`. */
enum { GROUP_ROWS, GROUP_COLUMNS, CODE_KIND, DETAILS };

enum code_kind { E2M1, OFFSET4, UINT4, NF4, E4M3, INT8, OFFSET8, UINT8, OFFSET2, OFFSET3 };
enum scale_kind { SCALE_F32, SCALE_BF16, SCALE_F16, SCALE_E4M3, SCALE_E8M0, SCALE_EXP2, SCALE_LDEXP };
enum product_kind { PRODUCT_F32, PRODUCT_BF16, PRODUCT_F16, PRODUCT_F64, PRODUCT_F127 };
enum zero_kind { ZERO_NONE, ZERO_PACKED, ZERO_BYTES, ZERO_FLOATS };
enum global_kind { GLOBAL_NONE, GLOBAL_MULTIPLIES, GLOBAL_DIVIDES };

struct stored_matrix {
    int form;
    int64_t rows, columns;
    const uint8_t *part[PARTS]; /* codes, scales, zeros, scale of scales, planes; levels of blocks; parts of `forms/ternary.h`; 0 where there is none */
    int32_t parameter[PARAMETERS];
    /* what `measure` finds, because divisions are slow: */
    int64_t row_bytes, across; /* bytes of a row of codes, scales of a row of groups */
    int shift, down_shift;     /* a group has 2^shift columns and 2^down_shift rows; -1 if it has another number */
};

static inline int scale_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] & 15; }
static inline int scale_size(const struct stored_matrix *m) {
    return scale_kind(m) == SCALE_F32 ? 4 : scale_kind(m) == SCALE_BF16 || scale_kind(m) == SCALE_F16 ? 2 : 1;
}
static inline int product_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 4 & 15; }
static inline int zero_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 8 & 15; }
static inline int global_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 12 & 15; }
static inline int is_high_first(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 16 & 1; }
static inline int is_word_aligned(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 17 & 1; }

/* Whether weights are sums, which begin with zero. */
static inline int is_sum(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 18 & 1; }

static inline int shift_of(int64_t count) { return (count & (count - 1)) == 0 ? __builtin_ctzll((uint64_t)count) : -1; }

static inline void measure(struct stored_matrix *m) {
    if (m->form == BLOCKS) m->row_bytes = (m->columns + 7) / 8;
    if (m->form != NIBBLES && m->form != BYTES && m->form != FEW_BITS) return;
    int64_t group = m->parameter[GROUP_COLUMNS], bits = m->form == NIBBLES ? 4 : m->form == BYTES ? 8 : m->parameter[CODE_KIND] == OFFSET2 ? 2 : 3;
    int64_t unit = is_word_aligned(m) ? 4 : 1;
    m->row_bytes = (m->columns * bits + 8 * unit - 1) / (8 * unit) * unit;
    m->across = (m->columns + group - 1) / group;
    m->shift = shift_of(group);
    m->down_shift = shift_of(m->parameter[GROUP_ROWS]);
}

/* In which group of columns a column is. */
static inline int64_t group_of(const struct stored_matrix *m, int64_t column) {
    return m->shift >= 0 ? column >> m->shift : column / m->parameter[GROUP_COLUMNS];
}

/* In which group of rows a row is. */
static inline int64_t down_of(const struct stored_matrix *m, int64_t row) {
    return m->down_shift >= 0 ? row >> m->down_shift : row / m->parameter[GROUP_ROWS];
}
