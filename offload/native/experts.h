/* The matrices of several experts, and what becomes of their sums. */

#pragma once

#include "calls.h"

/* Several matrices of one form and shape, of which rows `first` to `first` + `rows` - 1 are meant; `part` has PARTS pointers each. */
struct matrices {
    int form;
    const void *const *part;
    const int32_t *parameter; /* NULL if the form has none */
    int64_t rows, columns, first, count;
};

/* What becomes of the sums of the first product. Tables have the result for each of the 65536 bfloat16 numbers. */
struct gating {
    const uint16_t *gate, *linear; /* hidden = gate[g] * linear[u]; u itself if `linear` is NULL */
    int is_gated;                  /* else hidden = gate[g] */
    int is_interleaved;            /* g and u are rows 2 j and 2 j + 1 of one matrix */
};

/* One expert's matrices: where gates and linear parts come from, and biases of the two products, which may be NULL. */
struct expert_weights {
    struct matrices gate, linear, down;
    const uint16_t *const *up_bias, *const *down_bias;
};

void expertier_experts(enum order order, int64_t up_block, int64_t down_block, const struct expert_weights *w,
                       const struct gating *gating, int64_t num, const uint16_t *x, const int64_t *token, const int64_t *start,
                       uint16_t *hidden, uint16_t *const *y);
