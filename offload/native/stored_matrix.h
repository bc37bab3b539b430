/* A quantised matrix as it lies in memory, and what its numbers mean. codes/expander.py fills the struct;
   codes/encoding.py and codes/decode.py define every field. */

#pragma once

#include <stdint.h>

/* Numbers of stored forms go on from those of matvec.c: plain 0, compressed 1. */
enum stored_form { NIBBLES = 2, BYTES = 3 };

enum { CODES, SCALES, ZEROS, GLOBAL };

/* `parameter` is group rows, group columns (both at least 1), the kind of codes, and the fields of `enum detail`. */
enum { GROUP_ROWS, GROUP_COLUMNS, CODE_KIND, DETAILS };

enum code_kind { E2M1, OFFSET4, UINT4, NF4, E4M3, INT8, OFFSET8, UINT8 };
enum scale_kind { SCALE_F32, SCALE_BF16, SCALE_F16, SCALE_E4M3, SCALE_E8M0, SCALE_EXP2, SCALE_LDEXP };
enum product_kind { PRODUCT_F32, PRODUCT_BF16, PRODUCT_F16, PRODUCT_F64 };
enum zero_kind { ZERO_NONE, ZERO_PACKED, ZERO_BYTES };
enum global_kind { GLOBAL_NONE, GLOBAL_MULTIPLIES, GLOBAL_DIVIDES };

struct stored_matrix {
    int form;
    int64_t rows, columns;
    const uint8_t *part[4]; /* codes, scales, zeros, scale of scales; 0 where there is none */
    int32_t parameter[4];
};

static inline int scale_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] & 15; }
static inline int product_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 4 & 15; }
static inline int zero_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 8 & 15; }
static inline int global_kind(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 12 & 15; }
static inline int is_high_first(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 16 & 1; }
static inline int is_word_aligned(const struct stored_matrix *m) { return m->parameter[DETAILS] >> 17 & 1; }

static inline int64_t scales_across(const struct stored_matrix *m) {
    return (m->columns + m->parameter[GROUP_COLUMNS] - 1) / m->parameter[GROUP_COLUMNS];
}
