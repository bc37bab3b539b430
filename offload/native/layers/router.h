/* A router's product with one token, and its choice. */

#pragma once

#include "choice.h"
#include "siblings.h"

/* Logits come from `product`, in bfloat16, or from `wide`, in float32; from elsewhere if there is neither. */
struct router {
    struct siblings product; /* one matrix, or none */
    const uint16_t *wide;    /* [experts, width]; NULL if there is none */
    int64_t width;
    struct choice choice;
};

void expertier_multiply_wide(const float *x, int64_t rows, const uint16_t *w, int64_t experts, int64_t width, float *y);
int expertier_route(const struct router *router, const uint16_t *x, void *logits, int64_t *expert, void *weight);
