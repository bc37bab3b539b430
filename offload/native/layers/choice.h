/* Which experts a router chooses for one token, with the bits of torch's operations one after the other. */

#pragma once

#include <stdint.h>

enum choice_rule {
    SOFTMAX_FIRST, /* the largest of a float32 softmax over all logits */
    LARGEST_FIRST, /* a bfloat16 softmax over the largest logits */
    SIGMOID_FIRST, /* the largest of float32 sigmoids of all logits */
    LARGEST_FIRST_WIDE /* a float32 softmax over the largest logits */
};

/* Scores are what the rule makes of logits. They are compared with `bias` added, if there is one, and with `masked` in the place of
   those outside the best groups: `kept_groups` of `groups`, by the sum of the `best_of_group` largest of each. */
struct choice {
    int64_t experts, chosen; /* `chosen` is 0 if there is no choice, at most MOST_CHOSEN, and above `experts` / 64 */
    int64_t groups, kept_groups, best_of_group; /* `groups` divides `experts`; all are kept, or as for `chosen`; the last is 1 or 2 */
    const void *bias;
    float masked;
    float added, least, scale; /* weights are divided by their sum + `added`, or `least` if that is more; then times `scale` */
    int rule, normalises;      /* weights are divided at all if `normalises` */
    int is_rounded;            /* weights are bfloat16, else float32 */
    int lanes;                 /* numbers that torch computes side by side, a power of two, at most MOST_LANES */
    int is_wide, is_bias_wide; /* logits, and the bias, are float32, else bfloat16 */
    int is_sorted;             /* the best come first; else the order is that of a `topk` that does not sort */
    int is_unbiased;           /* weights are scores; else what was compared */
};

enum { MOST_CHOSEN = 15, MOST_LANES = 16 };

int expertier_choose(const struct choice *how, const void *logits, int64_t *expert, void *weight);
