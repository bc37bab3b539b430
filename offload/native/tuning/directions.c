/* Steps of bfloat16 weights along random directions of signs, in one pass over them, with the bits of torch's operations one after
   the other.

   Numbers come from SFC64 generators (Doty-Humphrey, PractRand). Eight run side by side, and every BLOCK numbers have eight of their
   own, so that blocks can be drawn by any thread. Weights are worked on in pieces that stay in the first cache. */

#include "../bfloat16.h"

#include <string.h>

enum { LANES = 8, WARM_UP = 18, BLOCK = 1 << 16, PIECE = 64 * LANES };

typedef uint64_t lanes __attribute__((vector_size(LANES * sizeof(uint64_t))));

struct generators {
    lanes a, b, c, counter;
};

/* A direction: its key, and how far weights go along it. */
struct along {
    uint64_t key[3];
    float size;
};

static inline void draw(struct generators *of, uint64_t *out) {
    lanes drawn = of->a + of->b + of->counter;
    of->counter += 1;
    of->a = of->b ^ (of->b >> 11);
    of->b = of->c + (of->c << 3);
    of->c = ((of->c << 24) | (of->c >> 40)) + drawn;
    memcpy(out, &drawn, sizeof drawn);
}

/* The generators of a block: `stream` is 2 of its number for signs, and one more for chances. */
static inline void begin(struct generators *of, const uint64_t *key, int64_t stream) {
    uint64_t unused[LANES];
    const lanes zero = {0}, number = {0, 1, 2, 3, 4, 5, 6, 7};
    of->a = zero + key[0];
    of->b = zero + key[1];
    of->c = number + (key[2] + (uint64_t)stream * LANES);
    of->counter = zero + 1;
    for (int round = 0; round < WARM_UP; round++) draw(of, unused);
}

/* Numbers of 64 bits of blocks `first`, first + 1, ..., each of which has `words`; `is_chance` chooses the generators. */
void expertier_draw(const uint64_t *key, int64_t first, int is_chance, int64_t words, int64_t count, uint64_t *out) {
#pragma omp parallel for schedule(static) if (count > words)
    for (int64_t begun = 0; begun < count; begun += words) {
        struct generators of;
        uint64_t drawn[LANES];
        int64_t left = count - begun < words ? count - begun : words;
        begin(&of, key, 2 * (first + begun / words) + is_chance);
        for (int64_t i = 0; i < left; i += LANES) {
            draw(&of, drawn);
            memcpy(out + begun + i, drawn, sizeof *out * (size_t)(left - i < LANES ? left - i : LANES));
        }
    }
}

/* Sign bits of numbers, from signs of a bit each, the lowest first: set where a number is negative. */
static inline void sign_bits(struct generators *of, uint32_t *negative) {
    uint64_t is_up[LANES];
    draw(of, is_up);
    for (int word = 0; word < LANES; word++)
        for (int half = 0; half < 2; half++, negative += 32) {
            uint32_t is_down = ~(uint32_t)(is_up[word] >> 32 * half);
#pragma omp simd
            for (int i = 0; i < 32; i++) negative[i] = is_down >> i << 31;
        }
}

static inline float with_sign(float size, uint32_t negative) {
    uint32_t bits;
    memcpy(&bits, &size, sizeof bits);
    bits ^= negative;
    memcpy(&size, &bits, sizeof bits);
    return size;
}

/* w += size sign, rounded up or down by chance: what bfloat16 cuts off decides, with a number from -32768 to 32767. */
static inline void move(uint16_t *w, const uint32_t *negative, const int16_t *chance, float size) {
#pragma omp simd
    for (int i = 0; i < PIECE; i++) {
        float moved = load_bf16(w[i]) + with_sign(size, negative[i]);
        uint32_t bits;
        memcpy(&bits, &moved, sizeof bits);
        w[i] = (uint16_t)((bits + (uint32_t)(int32_t)chance[i] + (1u << 15)) >> 16);
    }
}

/* out = w + size sign, rounded to nearest. */
static inline void perturb(const uint16_t *w, const uint32_t *negative, float size, uint16_t *out) {
#pragma omp simd
    for (int i = 0; i < PIECE; i++) out[i] = round_bf16(load_bf16(w[i]) + with_sign(size, negative[i]));
}

static inline void copy_piece(uint16_t *to, const uint16_t *from, int64_t count) {
    if (count == PIECE)
        memcpy(to, from, PIECE * sizeof *to); /* a constant: the compiler makes moves of it, and a slow loop of any other number */
    else
        memcpy(to, from, (size_t)count * sizeof *to);
}

static inline void chances(struct generators *of, int16_t *chance) {
    uint64_t drawn[LANES];
    for (int i = 0; i < PIECE; i += 4 * LANES) {
        draw(of, drawn);
        memcpy(chance + i, drawn, sizeof drawn);
    }
}

/* Weights of a tensor whose first block is `first` of its owner's: moved along some directions, one after the other, in their place;
   copied; and as they are seen at both ends of a direction. `copy`, `plus` and `minus` may be NULL. */
void expertier_visit(uint16_t *w, int64_t count, int64_t first, const struct along *moves, int64_t num_moves, uint16_t *copy,
                     const struct along *seen, uint16_t *plus, uint16_t *minus) {
#pragma omp parallel for schedule(static) if (count > BLOCK)
    for (int64_t begun = 0; begun < count; begun += BLOCK) {
        int64_t block = first + begun / BLOCK, end = count - begun < BLOCK ? count : begun + BLOCK;
        struct generators sign[num_moves + 1], chance[num_moves + 1];
        uint32_t negative[PIECE];
        int16_t chance_of[PIECE];
        uint16_t now[PIECE] = {0}, beside[PIECE];
        for (int64_t n = 0; n < num_moves; n++) {
            begin(&sign[n], moves[n].key, 2 * block);
            begin(&chance[n], moves[n].key, 2 * block + 1);
        }
        if (seen) begin(&sign[num_moves], seen->key, 2 * block);
        for (int64_t i = begun; i < end; i += PIECE) {
            int64_t left = end - i < PIECE ? end - i : PIECE;
            copy_piece(now, w + i, left);
            for (int64_t n = 0; n < num_moves; n++) {
                sign_bits(&sign[n], negative);
                chances(&chance[n], chance_of);
                move(now, negative, chance_of, moves[n].size);
            }
            if (num_moves) copy_piece(w + i, now, left);
            if (copy) copy_piece(copy + i, now, left);
            if (!seen) continue;
            sign_bits(&sign[num_moves], negative);
            if (plus) {
                perturb(now, negative, seen->size, beside);
                copy_piece(plus + i, beside, left);
            }
            if (minus) {
                perturb(now, negative, -seen->size, beside);
                copy_piece(minus + i, beside, left);
            }
        }
    }
}
