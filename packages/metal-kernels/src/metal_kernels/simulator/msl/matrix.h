// metal_matrix: small matrices of float or half, stored by columns.
#pragma once
#include "math.h"

namespace metal {
template <class T, int C, int R> struct matrix {
  typedef vec<T, R> column;
  column columns[C];
  MSL_CONSTRUCTOR(matrix) MSL_COPIES(matrix) MSL_ASSIGNMENTS(matrix)
  MSL_FN explicit matrix(T diagonal) {
    for (int c = 0; c < C; c++)
      for (int r = 0; r < R; r++) columns[c][r] = r == c ? diagonal : (T)0;
  }
  template <class U> MSL_FN explicit matrix(matrix<U, C, R> m) {
    for (int c = 0; c < C; c++) columns[c] = __builtin_convertvector(m.columns[c], column);
  }
  // From its columns, or from its elements column by column.
  template <class A, class... More, enable_if_t<sizeof...(More) + 1 == C || sizeof...(More) + 1 == C * R, bool> = true>
  MSL_FN matrix(A first, More... more) {
    if constexpr (msl_shape<A>::is_vector) {
      column given[] = {first, more...};
      for (int c = 0; c < C; c++) columns[c] = given[c];
    } else {
      T given[] = {(T)first, (T)more...};
      for (int k = 0; k < C * R; k++) columns[k / R][k % R] = given[k];
    }
  }
  MSL_FN column& operator[](int c) { return columns[c]; }
  MSL_FN column operator[](int c) const { return columns[c]; }
  MSL_FN const constant column& operator[](int c) const constant { return columns[c]; }
  friend MSL_FN column operator*(matrix m, vec<T, C> v) {
    column r = (column)(T)0;
    for (int c = 0; c < C; c++) r += m.columns[c] * (column)v[c];
    return r;
  }
  friend MSL_FN vec<T, C> operator*(column v, matrix m) {
    vec<T, C> r;
    for (int c = 0; c < C; c++) r[c] = dot(v, m.columns[c]);
    return r;
  }
#define MSL_MATRIX_OPERATOR(op, A, right)                     \
  friend MSL_FN matrix operator op(matrix a, A b) {           \
    for (int c = 0; c < C; c++) a.columns[c] = a.columns[c] op right; \
    return a;                                                 \
  }
  MSL_MATRIX_OPERATOR(+, matrix, b.columns[c]) MSL_MATRIX_OPERATOR(-, matrix, b.columns[c]) MSL_MATRIX_OPERATOR(*, T, (column)b)
  friend MSL_FN matrix operator*(T a, matrix b) { return b * a; }
  friend MSL_FN matrix operator-(matrix a) { return a * (T)-1; }
  friend MSL_FN bool operator==(matrix a, matrix b) {
    bool same = true;
    for (int c = 0; c < C; c++)
      for (int r = 0; r < R; r++) same &= a.columns[c][r] == b.columns[c][r];
    return same;
  }
  friend MSL_FN bool operator!=(matrix a, matrix b) { return !(a == b); }
#define MSL_MATRIX_ASSIGNMENT(op, SPACE) \
  template <class A> MSL_FN void operator op##=(A a) SPACE { *this = *this op a; }
  MSL_MATRIX_ASSIGNMENT(+, thread) MSL_MATRIX_ASSIGNMENT(-, thread) MSL_MATRIX_ASSIGNMENT(*, thread)
  MSL_MATRIX_ASSIGNMENT(+, device) MSL_MATRIX_ASSIGNMENT(-, device) MSL_MATRIX_ASSIGNMENT(*, device)
  MSL_MATRIX_ASSIGNMENT(+, threadgroup) MSL_MATRIX_ASSIGNMENT(-, threadgroup) MSL_MATRIX_ASSIGNMENT(*, threadgroup)
};
template <class T, int K, int R, int C> MSL_FN matrix<T, C, R> operator*(matrix<T, K, R> a, matrix<T, C, K> b) {
  matrix<T, C, R> r;
  for (int c = 0; c < C; c++) r.columns[c] = a * b.columns[c];
  return r;
}
template <class T, int C, int R> MSL_FN matrix<T, R, C> transpose(matrix<T, C, R> m) {
  matrix<T, R, C> t;
  for (int c = 0; c < C; c++)
    for (int r = 0; r < R; r++) t.columns[r][c] = m.columns[c][r];
  return t;
}
// By elimination, with the largest pivot first.
template <class T, int N> MSL_FN T determinant(matrix<T, N, N> m) {
  float d = 1;
  for (int k = 0; k < N; k++) {
    int best = k;
    for (int c = k + 1; c < N; c++)
      if (fabs((float)m.columns[c][k]) > fabs((float)m.columns[best][k])) best = c;
    vec<T, N> pivot = m.columns[best];
    if (pivot[k] == (T)0) return (T)0;
    if (best != k) m.columns[best] = m.columns[k], d = -d;
    d *= (float)pivot[k];
    for (int c = k + 1; c < N; c++) m.columns[c] -= pivot * (vec<T, N>)(T)(m.columns[c][k] / pivot[k]);
  }
  return (T)d;
}
}  // namespace metal
#define MSL_MATRICES(T)                                                                          \
  typedef metal::matrix<T, 2, 2> T##2x2; typedef metal::matrix<T, 2, 3> T##2x3; typedef metal::matrix<T, 2, 4> T##2x4; \
  typedef metal::matrix<T, 3, 2> T##3x2; typedef metal::matrix<T, 3, 3> T##3x3; typedef metal::matrix<T, 3, 4> T##3x4; \
  typedef metal::matrix<T, 4, 2> T##4x2; typedef metal::matrix<T, 4, 3> T##4x3; typedef metal::matrix<T, 4, 4> T##4x4;
MSL_MATRICES(float) MSL_MATRICES(half)
