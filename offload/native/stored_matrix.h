/* A matrix as it lies in memory: in which stored form, and where each part of it is. */

#pragma once

#include <stdint.h>

enum { PARTS = 4, PARAMETERS = 4 };

struct stored_matrix {
    int form; /* PLAIN, COMPRESSED, ... */
    int64_t rows, columns;
    const uint8_t *part[PARTS];      /* weights; codes, scales, zeros; ... */
    int32_t parameter[PARAMETERS];   /* what the form makes of them: group sizes, kinds of scales, ... */
};
