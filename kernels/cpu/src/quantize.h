// The quantiser's part of the C interface: nested k-means (quant/kmeans.py) and its refinement (quant/refine.py).
#pragma once

#include "api.h"

// One block of columns of a coordinate descent, on all rows; see dpllm::Descent.
DPLLM_EXPORT void dpllm_descend(Context* c, const dpllm::Descent* d, int rows);

// out [rows, widths, columns]: each weight's value at each width. tables: [tables, widths, 2^parent_bits], of which width
// seed_bits + b uses the first 2^(seed_bits + b) entries.
DPLLM_EXPORT void dpllm_table_values(Context* c, const uint8_t* codes, const float* tables, int rows, int columns,
                                     int seed_bits, int parent_bits, int rows_per_table, float* out);

// The transpose: out [tables, widths, 2^parent_bits] = the sum of scale[row] * values over the weights of each code.
DPLLM_EXPORT void dpllm_table_sums(Context* c, const uint8_t* codes, const float* values, const float* scale, int rows,
                                   int columns, int seed_bits, int parent_bits, int rows_per_table, float* out);

// Nested weighted k-means of each row. values, weights: [rows, count], weights not negative and not all zero in a row;
// codes [rows, count] of parent_bits; centres: [rows, widths, 2^parent_bits] in double, as in dpllm_table_values.
// seed_iterations: the most steps of Lloyd's algorithm.
DPLLM_EXPORT void dpllm_nested_codes(Context* c, const float* values, const float* weights, int rows, int count,
                                     int seed_bits, int parent_bits, int seed_iterations, uint8_t* codes,
                                     double* centres);
