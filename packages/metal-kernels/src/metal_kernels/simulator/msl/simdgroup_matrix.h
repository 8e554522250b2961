// metal_simdgroup_matrix: 8x8 matrices spread over the 32 lanes, two elements a lane, in Apple's layout.
#pragma once
#include "simdgroup.h"

namespace metal {
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>,
                "simdgroup_matrix holds float, half or bfloat");
  typedef vec<T, 2> storage_type;
  storage_type elements_;
  MSL_FN simdgroup_matrix() {}
  MSL_FN explicit simdgroup_matrix(T diagonal) {
    uint lane = msl_lane();
    elements_ = (storage_type)((T)0);
    if (row(lane) == column(lane)) elements_.x = diagonal;
    else if (row(lane) == column(lane) + 1) elements_.y = diagonal;
  }
  MSL_FN static uint row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  MSL_FN static uint column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
  MSL_FN static uint lane_of(uint row, uint column) {
    return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column >> 1 & 1);
  }
  MSL_FN thread storage_type& thread_elements() thread { return elements_; }
  MSL_FN const thread storage_type& thread_elements() const thread { return elements_; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C = R> MSL_FN simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, R, C>(value);
}
template <class T, int R, int C = R> MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.elements_ = (vec<T, 2>)value;
  return m;
}

template <class T, int R, int C> MSL_FN ulong msl_matrix_offset(uint j, ulong stride, ulong2 origin, bool transpose) {
  typedef simdgroup_matrix<T, R, C> M;
  ulong row = M::row(msl_lane()), column = M::column(msl_lane()) + j;
  if (transpose) return (column + origin.y) * stride + row + origin.x;
  return (row + origin.y) * stride + column + origin.x;
}
#define MSL_MATRIX_IO(SPACE)                                                                                      \
  template <class T, int R, int C>                                                                                \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T, R, C>& m, const SPACE T* from, ulong stride = C,          \
                             ulong2 origin = (ulong2)(0ul), bool transpose = false) {                             \
    for (uint j = 0; j < 2; j++) m.elements_[j] = from[msl_matrix_offset<T, R, C>(j, stride, origin, transpose)]; \
  }                                                                                                               \
  template <class T, int R, int C>                                                                                \
  MSL_FN void simdgroup_store(simdgroup_matrix<T, R, C> m, SPACE T* to, ulong stride = C,                         \
                              ulong2 origin = (ulong2)(0ul), bool transpose = false) {                            \
    for (uint j = 0; j < 2; j++) to[msl_matrix_offset<T, R, C>(j, stride, origin, transpose)] = m.elements_[j];   \
  }
MSL_MATRIX_IO(device) MSL_MATRIX_IO(threadgroup)

struct msl_factors {
  float a[2], b[2];
};
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, msl_site site = MSL_SITE) {
  typedef simdgroup_matrix<D, 8, 8> M;
  msl_factors own = {{(float)a.elements_.x, (float)a.elements_.y}, {(float)b.elements_.x, (float)b.elements_.y}};
  MSL_PUBLISH(own);
  uint row = M::row(msl_lane()), column = M::column(msl_lane());
  float x = (float)c.elements_.x, y = (float)c.elements_.y;
  for (uint k = 0; k < 8; k++) {
    float left = msl_of_lane<msl_factors>(lanes, M::lane_of(row, k)).a[k & 1];
    msl_factors right = msl_of_lane<msl_factors>(lanes, M::lane_of(k, column));
    x += left * right.b[0];
    y += left * right.b[1];
  }
  d.elements_.x = (D)x;
  d.elements_.y = (D)y;
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                               msl_site site = MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), site);
}
template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
