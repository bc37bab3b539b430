/* What files of this library call of each other. */

#pragma once

#include <stdint.h>

enum order { ORDER_AMX, ORDER_PAIRS, ORDER_LANES, ORDER_INTEGERS };

void expertier_multiply(enum order order, int64_t block, int form, const void *const *part, const int32_t *parameter, int64_t num,
                        const uint16_t *const *bias, const uint16_t *x, int64_t x_rows, int64_t x_step, uint16_t *const *y,
                        const int64_t *rows, int64_t columns);
void expertier_rms_norm(int rounds_first, const uint16_t *x, const uint16_t *w, float eps, uint16_t *y, int64_t rows,
                        int64_t columns);
void expertier_rotate(const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns, int64_t rotated, const uint16_t *cos,
                      const uint16_t *sin, int64_t angles);
float expertier_sum(const float *value, int64_t count);
