/* Which experts a router chooses for one token, with the bits of torch's operations one after the other. */

#pragma once

#include <stdint.h>

enum choice_rule {
    SOFTMAX_FIRST, /* the largest of a float32 softmax over all logits */
    LARGEST_FIRST  /* a bfloat16 softmax over the largest logits */
};

struct choice {
    int64_t experts, chosen; /* `chosen` is 0 if there is no choice, at most MOST_CHOSEN, and above `experts` / 64 */
    int rule, normalises;    /* weights are divided by their sum if `normalises` */
    int is_rounded;          /* weights are bfloat16, else float32 */
    int lanes;               /* numbers that torch's softmax adds side by side, a power of two, at most MOST_LANES */
};

enum { MOST_CHOSEN = 15, MOST_LANES = 16 };

int expertier_choose(const struct choice *how, const uint16_t *logits, int64_t *expert, void *weight);
