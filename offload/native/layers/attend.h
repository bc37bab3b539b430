/* Attention of one token, with the bits of torch's. */

#pragma once

#include <stdint.h>

/* The heads of a token: `shared_heads` of keys and values, each for as many of the `heads` of queries. */
struct heads {
    int64_t heads, shared_heads, width;
    float scale;
};

/* Keys or values of `positions` tokens: those of a head are [positions, width], and heads lie `stride` numbers apart. */
struct cached {
    const uint16_t *first;
    int64_t stride;
};

int expertier_attend(const struct heads *of, int64_t positions, const uint16_t *query, const struct cached *keys,
                     const struct cached *values, uint16_t *attended);
