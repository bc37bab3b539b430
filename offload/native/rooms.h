/* What one thread computes in: rooms for expanded weights and for sums. */

#pragma once

#include "strips.h"

struct room {
    uint16_t chunk[2][CHUNK_WEIGHTS] __attribute__((aligned(64)));
    uint32_t pairs[CHUNK / 2 * STRIP_ROWS] __attribute__((aligned(64)));
    float *sums;     /* as many as an order of summation keeps between chunks */
    uint16_t *strip; /* a whole strip, where each row is multiplied several times */
};
