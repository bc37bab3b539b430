/* Products of a few rows of x with matrices in any stored form, and whole experts, at the speed of memory.

   y[i][r] = sum_c w[r][c] * x[i][c], accumulated in float32, rounded to bfloat16 once. The order of a sum depends on the order
   that was asked for and on the number of columns. It does not depend on threads, on the rows beside, or on the stored form; but for
   the order of integers, which only some forms have, and whose weights are not rounded. */

#include <omp.h>

#include "calls.h"
#include "experts.h"
#include "orders/amx.h"
#include "orders/integers.h"
#include "orders/lanes.h"
#include "orders/pairs.h"
#include "orders/panels.h"

enum { MOST_STRIPS_AT_ONCE = 16, TASKS_OF_A_THREAD = 4 };

/* An order of summation; `block` is that of `pairs_strip` and `amx_strip`, and the columns of a group for `integers_strip`. */
struct summation {
    enum order order;
    int64_t block;
};

static inline struct summation summation(enum order order, int64_t block, const int32_t *parameter) {
    return (struct summation){order, order == ORDER_INTEGERS ? parameter[GROUP_COLUMNS] : block};
}

/* Whether the order of integers has instructions of its own here. */
int expertier_has_quick_integers(void) {
#ifdef HAS_QUICK_INTEGERS
    return 1;
#else
    return 0;
#endif
}

/* Whether matrices of a form can be multiplied in the order of integers. */
int expertier_has_integers(int form, const int32_t *parameter, int64_t columns) {
    struct stored_matrix m = {.form = form, .columns = columns};
    if (form != FEW_BITS) return 0;
    memcpy(m.parameter, parameter, sizeof m.parameter);
    measure(&m);
    return has_integers(&m);
}

struct worker {
    struct amx amx;
    struct room room;
};

/* Rooms for products with at most `rows` rows of x and `columns` columns. */
static void begin_work(struct worker *worker, const struct summation *by, int64_t rows, int64_t columns) {
    size_t sums = by->order == ORDER_PAIRS ? pairs_sums(rows) : by->order == ORDER_LANES ? lanes_sums() : 1;
    worker->room.sums = aligned_alloc(64, (sums * sizeof(float) + 63) / 64 * 64);
    worker->room.strip = by->order == ORDER_AMX ? aligned_alloc(64, STRIP_ROWS * (size_t)padded(columns) * sizeof(uint16_t)) : NULL;
    if (by->order == ORDER_AMX) begin_amx(&worker->amx);
}

static void end_work(struct worker *worker, const struct summation *by) {
    if (by->order == ORDER_AMX) end_amx(&worker->amx);
    free(worker->room.sums);
    free(worker->room.strip);
}

/* Bytes of the rows of x as an order reads them, whole groups of rows. */
static inline size_t packed_bytes(const struct summation *by, int64_t rows, int64_t columns) {
    int64_t row = padded(columns) * (int64_t)(by->order == ORDER_LANES ? sizeof(float) : sizeof(uint16_t));
    if (by->order == ORDER_INTEGERS) row = integers_row_bytes(columns, by->block);
    return (size_t)((rows + X_ROWS - 1) / X_ROWS * X_ROWS * row);
}

static inline void pack(const struct summation *by, const struct inputs *x, int64_t group) {
    if (by->order == ORDER_INTEGERS)
        pack_integers(x, group, by->block);
    else if (by->order == ORDER_LANES)
        pack_lanes(x, group);
    else
        pack_pairs(x, group);
}

static inline void multiply_strip(struct worker *worker, const struct summation *by, const struct stored_matrix *m, int64_t row,
                                  const uint16_t *bias, const struct inputs *x, uint16_t *y, int64_t y_stride) {
    if (by->order == ORDER_INTEGERS) {
        integers_strip(m, row, bias, x, y, y_stride);
        return;
    }
    struct strip s = begin_strip(m, row, bias);
    if (by->order == ORDER_AMX)
        amx_strip(&worker->amx, by->block, &s, x, &worker->room, y, y_stride);
    else if (by->order == ORDER_PAIRS)
        pairs_strip(by->block, &s, x, &worker->room, y, y_stride);
    else
        lanes_strip(&s, x, &worker->room, y, y_stride);
}

/* Strips of a product that threads take one after the other. */
struct tasks {
    int64_t strips, taken;
};

/* The next task: its first strip, and its end; none is left if both are equal. The first strip of a task was not asked for before, so
   tasks are long, but each thread should have several, and the last ones are short, so that threads end together.
   (MXFP4 from memory, two cores of a Xeon with AMX, the best of 45 runs: 12.8 GB/s with 4 strips, 15.6 with 16.) */
static inline int64_t take_strips(struct tasks *tasks, int64_t *end) {
    int64_t first = __atomic_load_n(&tasks->taken, __ATOMIC_RELAXED);
    do {
        int64_t left = tasks->strips - first, most = left / (TASKS_OF_A_THREAD * omp_get_num_threads());
        most = most < MOST_STRIPS_AT_ONCE ? most : MOST_STRIPS_AT_ONCE;
        *end = first + (most > 1 ? most : left > 0);
    } while (!__atomic_compare_exchange_n(&tasks->taken, &first, *end, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return first;
}

static inline int64_t num_strips(int64_t rows) { return (rows + STRIP_ROWS - 1) / STRIP_ROWS; }

static struct stored_matrix matrix_of(const struct matrices *of, int64_t n) {
    struct stored_matrix m = {.form = of->form, .rows = of->rows, .columns = of->columns};
    for (int p = 0; p < PARTS; p++) m.part[p] = of->part[n * PARTS + p];
    if (of->parameter) memcpy(m.parameter, of->parameter, sizeof m.parameter);
    measure(&m);
    return m;
}

/* y[n] = x[n] w[n]^T for n = 0 .. num - 1: w[n] has rows[n] rows, x[n] has `x_rows` rows and begins x_step numbers after x[n - 1]
   (0: all are one), y[n] is [x_rows, rows[n]]. A bias is added to each sum before it is rounded; `bias` or one of its elements may
   be NULL. For AMX, rows and columns are multiples of 32; for integers, `expertier_has_integers` says yes. */
void expertier_multiply(enum order order, int64_t block, int form, const void *const *part, const int32_t *parameter, int64_t num,
                        const uint16_t *const *bias, const uint16_t *x, int64_t x_rows, int64_t x_step, uint16_t *const *y,
                        const int64_t *rows, int64_t columns) {
    const struct summation by = summation(order, block, parameter);
    struct inputs input[num];
    int64_t inputs = x_step ? num : 1, strips = 0;
    for (int64_t n = 0; n < num; n++) strips += num_strips(rows[n]);
    for (int64_t n = 0; n < inputs; n++) {
        input[n] = (struct inputs){x + n * x_step, NULL, x_rows, columns, NULL};
        input[n].packed = aligned_alloc(64, packed_bytes(&by, x_rows, columns));
    }
    int64_t groups = num_groups(&input[0]);
    struct tasks tasks = {strips, 0};
#pragma omp parallel
    {
        struct worker worker;
        int64_t end;
        begin_work(&worker, &by, x_rows, columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < inputs * groups; i++) pack(&by, &input[i / groups], i % groups);
        for (int64_t first = take_strips(&tasks, &end); first < end; first = take_strips(&tasks, &end))
            for (int64_t i = first; i < end; i++) {
                int64_t n = 0, row = i * STRIP_ROWS;
                for (; row >= rows[n]; n++) row -= num_strips(rows[n]) * STRIP_ROWS;
                const struct matrices of = {form, part, parameter, rows[n], columns, 0, rows[n]};
                struct stored_matrix m = matrix_of(&of, n);
                multiply_strip(&worker, &by, &m, row, bias ? bias[n] : NULL, &input[x_step ? n : 0], y[n] + row, rows[n]);
            }
        end_work(&worker, &by);
    }
    for (int64_t n = 0; n < inputs; n++) free(input[n].packed);
}

/* y = x w: x is [rows, w_rows], w [w_rows, columns], y [rows, columns]; 0, and nothing done, where only lanes are there. */
int expertier_multiply_turned(enum order order, const uint16_t *x, int64_t rows, const uint16_t *w, int64_t w_rows, int64_t columns,
                              uint16_t *y) {
#ifdef HAS_PANELS
    if (order == ORDER_LANES) return 0;
    uint16_t *tiles = order == ORDER_AMX ? aligned_alloc(64, (size_t)(tiled(rows) * tiled(w_rows)) * sizeof *tiles) : NULL;
#pragma omp parallel
    {
        struct amx amx;
        struct panel_room *room = aligned_alloc(64, panel_room_bytes(rows));
        if (tiles) {
            begin_amx(&amx);
            configure(&amx, X_ROWS);
#pragma omp for schedule(static)
            for (int64_t begin = 0; begin < rows; begin += STRIPE) tile_rows(x, rows, w_rows, begin, tiles);
        }
#pragma omp for schedule(dynamic)
        for (int64_t column = 0; column < columns; column += PANEL_COLUMNS) {
            int64_t left = columns - column, count = left < PANEL_COLUMNS ? left : PANEL_COLUMNS;
            multiply_panel(x, tiles, rows, w, w_rows, columns, column, count, room, y);
        }
        if (tiles) end_amx(&amx);
        free(room);
    }
    free(tiles);
    return 1;
#else
    return 0;
#endif
}

/* --- whole experts ------------------------------------------------------------------------------------------------ */

/* The rows of each expert are `token[start[n]]` to `token[start[n + 1] - 1]`; its inputs, packed one after the other. */
static void expert_inputs(const struct summation *by, struct inputs *input, int64_t num, const uint16_t *x, const int64_t *token,
                          const int64_t *start, int64_t columns, uint8_t *packed) {
    for (int64_t n = 0; n < num; n++) {
        const uint16_t *from = token ? x : x + start[n] * columns;
        input[n] = (struct inputs){from, token ? token + start[n] : NULL, start[n + 1] - start[n], columns, packed};
        packed += packed_bytes(by, input[n].rows, columns);
    }
}

static size_t experts_packed_bytes(const struct summation *by, int64_t num, const int64_t *start, int64_t columns) {
    size_t bytes = 0;
    for (int64_t n = 0; n < num; n++) bytes += packed_bytes(by, start[n + 1] - start[n], columns);
    return bytes;
}

static inline uint16_t gated(const struct gating *by, uint16_t g, uint16_t u) {
    uint16_t value = by->gate[g];
    if (!by->is_gated) return value;
    return round_bf16(load_bf16(value) * load_bf16(by->linear ? by->linear[u] : u));
}

/* A bias is added to what has been rounded, as transformers does for experts. */
static inline void add_bias(const uint16_t *bias, int64_t rows, int64_t count, uint16_t *y, int64_t y_stride) {
    if (!bias) return;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < count; j++) y[i * y_stride + j] = round_bf16(load_bf16(y[i * y_stride + j]) + load_bf16(bias[j]));
}

/* The hidden numbers that come of one strip, for all rows of x. */
static inline void gate_strip(const struct gating *by, const uint16_t *g, const uint16_t *u, int64_t rows, int64_t count,
                              uint16_t *hidden, int64_t width) {
    for (int64_t i = 0; i < rows; i++, g += STRIP_ROWS, u += STRIP_ROWS)
        for (int64_t j = 0; j < count; j++)
            hidden[i * width + j] = by->is_interleaved ? gated(by, g[2 * j], g[2 * j + 1]) : gated(by, g[j], u[j]);
}

/* Hidden numbers of expert n that come of the strip that begins at `row` of its gates. */
static void up_strip(struct worker *worker, const struct summation *by, const struct expert_weights *w, const struct gating *gating,
                     int64_t n, int64_t row, const struct inputs *x, uint16_t *sums, uint16_t *hidden, int64_t width) {
    uint16_t *gates = sums, *linears = sums + x->rows * STRIP_ROWS;
    const uint16_t *bias = w->up_bias ? w->up_bias[n] : NULL;
    int64_t left = w->gate.count - row, count = left < STRIP_ROWS ? left : STRIP_ROWS;
    struct stored_matrix m = matrix_of(&w->gate, n);
    multiply_strip(worker, by, &m, w->gate.first + row, NULL, x, gates, STRIP_ROWS);
    add_bias(bias ? bias + row : NULL, x->rows, count, gates, STRIP_ROWS);
    if (gating->is_gated && !gating->is_interleaved) {
        m = matrix_of(&w->linear, n);
        multiply_strip(worker, by, &m, w->linear.first + row, NULL, x, linears, STRIP_ROWS);
        add_bias(bias ? bias + w->gate.count + row : NULL, x->rows, count, linears, STRIP_ROWS);
    }
    int64_t step = gating->is_interleaved ? 2 : 1;
    gate_strip(gating, gates, linears, x->rows, count / step, hidden + row / step, width);
}

/* y[n] = gating(x gate[n]^T, x linear[n]^T) down[n]^T for the rows of x that each of the `num` experts has; see expert_inputs.
   `hidden` is room for [rows of all experts, width of an expert]; y[n] is [rows of the expert, width of the model]. */
void expertier_experts(enum order order, int64_t up_block, int64_t down_block, const struct expert_weights *w,
                       const struct gating *gating, int64_t num, const uint16_t *x, const int64_t *token, const int64_t *start,
                       uint16_t *hidden, uint16_t *const *y) {
    const struct summation up_by = summation(order, up_block, w->gate.parameter), down_by = summation(order, down_block, w->down.parameter);
    int64_t width = w->down.columns, model_width = w->down.count, most = 1;
    int64_t up_strips = num_strips(w->gate.count), down_strips = num_strips(model_width);
    for (int64_t n = 0; n < num; n++) most = start[n + 1] - start[n] > most ? start[n + 1] - start[n] : most;
    int64_t groups = (most + X_ROWS - 1) / X_ROWS, widest = width > model_width ? width : model_width;
    struct inputs input[num], inner[num];
    size_t input_bytes = experts_packed_bytes(&up_by, num, start, model_width);
    uint8_t *packed = aligned_alloc(64, input_bytes + experts_packed_bytes(&down_by, num, start, width));
    expert_inputs(&up_by, input, num, x, token, start, model_width, packed);
    expert_inputs(&down_by, inner, num, hidden, NULL, start, width, packed + input_bytes);
    struct tasks up_tasks = {num * up_strips, 0}, down_tasks = {num * down_strips, 0};
#pragma omp parallel
    {
        struct worker worker;
        int64_t end;
        begin_work(&worker, &up_by, most, widest);
        uint16_t *sums = aligned_alloc(64, 2 * (size_t)most * STRIP_ROWS * sizeof(uint16_t));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num * groups; i++)
            if (i % groups < num_groups(&input[i / groups])) pack(&up_by, &input[i / groups], i % groups);
        for (int64_t first = take_strips(&up_tasks, &end); first < end; first = take_strips(&up_tasks, &end))
            for (int64_t i = first; i < end; i++) {
                int64_t n = i / up_strips, row = i % up_strips * STRIP_ROWS;
                up_strip(&worker, &up_by, w, gating, n, row, &input[n], sums, hidden + start[n] * width, width);
            }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num * groups; i++)
            if (i % groups < num_groups(&inner[i / groups])) pack(&down_by, &inner[i / groups], i % groups);
        for (int64_t first = take_strips(&down_tasks, &end); first < end; first = take_strips(&down_tasks, &end))
            for (int64_t i = first; i < end; i++) {
                int64_t n = i / down_strips, row = i % down_strips * STRIP_ROWS, left = model_width - row;
                struct stored_matrix m = matrix_of(&w->down, n);
                multiply_strip(&worker, &down_by, &m, w->down.first + row, NULL, &inner[n], y[n] + row, model_width);
                const uint16_t *bias = w->down_bias ? w->down_bias[n] + row : NULL;
                add_bias(bias, inner[n].rows, left < STRIP_ROWS ? left : STRIP_ROWS, y[n] + row, model_width);
            }
        free(sums);
        end_work(&worker, &up_by);
    }
    free(packed);
}

/* All of a compressed matrix, row-major. */
void expertier_expand(const void *w, int64_t rows, int64_t columns, uint16_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows / BLOCK_ROWS; i++) {
        struct compressed_block at = compressed_block(w, rows, columns, i);
        expand_block(&at, out + i * BLOCK_ROWS * columns, columns);
    }
}
