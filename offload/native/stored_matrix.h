/* A matrix as it is stored: what every expander of `forms/` reads. */

#ifndef EXPERTIER_STORED_MATRIX_H
#define EXPERTIER_STORED_MATRIX_H

#include <stdint.h>

/* `part` has the codes first, then their companions; what the parameters mean is up to the form. */
struct stored_matrix {
    int form;
    int64_t rows, columns;
    const uint8_t *part[4];
    int32_t parameter[4];
};

#endif
