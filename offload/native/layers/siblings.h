/* Matrices of one width and form that are multiplied with the same row; see `expertier_multiply`. */

#pragma once

#include "../calls.h"

struct siblings {
    enum order order;
    int form;
    int64_t block, num, columns;
    const void *const *part;
    const int32_t *parameter;
    const uint16_t *const *bias;
    const int64_t *rows;
};

static inline void multiply_siblings(const struct siblings *w, const uint16_t *x, uint16_t *const *y) {
    expertier_multiply(w->order, w->block, w->form, w->part, w->parameter, w->num, w->bias, x, 1, 0, y, w->rows, w->columns);
}
