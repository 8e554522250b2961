// Vector construction, conversion and packed vectors: what the pre-pass turns Metal's vector syntax into.
#pragma once
#include "types.h"

namespace metal {
template <class V, int I, class A> MSL_FN constexpr void msl_place(thread V& v, A a) {
  typedef typename msl_shape<V>::element E;
  if constexpr (msl_shape<A>::is_vector) {
    for (int k = 0; k < msl_shape<A>::size; k++) v[I + k] = (E)a[k];
  } else {
    v[I] = (E)a;
  }
}
template <class V, int I> MSL_FN constexpr void msl_place_all(thread V&) {
  static_assert(I == msl_shape<V>::size, "too few components in vector constructor");
}
template <class V, int I, class A, class... R> MSL_FN constexpr void msl_place_all(thread V& v, A a, R... rest) {
  static_assert(I + msl_shape<A>::size <= msl_shape<V>::size, "too many components in vector constructor");
  msl_place<V, I, A>(v, a);
  msl_place_all<V, I + msl_shape<A>::size>(v, rest...);
}

template <class A, class B>
constexpr constant bool msl_half_to_bfloat =
    (is_same_v<A, half> && is_same_v<B, bfloat>) || (is_same_v<A, bfloat> && is_same_v<B, half>);

// Vectors of bool are a class: clang has none. A comparison of vectors, whose lanes are 0 and -1, becomes one.
template <int N> struct msl_bool_lanes;
template <> struct msl_bool_lanes<2> { MSL_CONSTRUCTOR(msl_bool_lanes) MSL_COPIES(msl_bool_lanes) MSL_ASSIGNMENTS(msl_bool_lanes) bool x, y; };
template <> struct msl_bool_lanes<3> { MSL_CONSTRUCTOR(msl_bool_lanes) MSL_COPIES(msl_bool_lanes) MSL_ASSIGNMENTS(msl_bool_lanes) bool x, y, z; };
template <> struct msl_bool_lanes<4> { MSL_CONSTRUCTOR(msl_bool_lanes) MSL_COPIES(msl_bool_lanes) MSL_ASSIGNMENTS(msl_bool_lanes) bool x, y, z, w; };
template <int N> struct msl_bools : msl_bool_lanes<N> {
  MSL_CONSTRUCTOR(msl_bools) MSL_COPIES(msl_bools) MSL_ASSIGNMENTS(msl_bools)
  MSL_FN msl_bools(bool b) { for (int i = 0; i < N; i++) (*this)[i] = b; }
  template <class... R, enable_if_t<sizeof...(R) == N - 2, bool> = true>
  MSL_FN msl_bools(bool a, bool b, R... rest) : msl_bool_lanes<N>{a, b, (bool)rest...} {}
  template <class E> MSL_FN msl_bools(vec<E, N> v) { for (int i = 0; i < N; i++) (*this)[i] = v[i] != (E)0; }
  MSL_FN bool& operator[](int i) { return (&this->x)[i]; }
  MSL_FN bool operator[](int i) const { return (&this->x)[i]; }
  MSL_FN vec<char, N> lanes() const {
    vec<char, N> v;
    for (int i = 0; i < N; i++) v[i] = (*this)[i];
    return v;
  }
  MSL_FN msl_bools operator!() const { return lanes() == (vec<char, N>)(char)0; }
  friend MSL_FN msl_bools operator&&(msl_bools a, msl_bools b) { return a.lanes() & b.lanes(); }
  friend MSL_FN msl_bools operator||(msl_bools a, msl_bools b) { return a.lanes() | b.lanes(); }
  friend MSL_FN msl_bools operator&(msl_bools a, msl_bools b) { return a.lanes() & b.lanes(); }
  friend MSL_FN msl_bools operator|(msl_bools a, msl_bools b) { return a.lanes() | b.lanes(); }
  friend MSL_FN msl_bools operator^(msl_bools a, msl_bools b) { return a.lanes() ^ b.lanes(); }
  friend MSL_FN msl_bools operator==(msl_bools a, msl_bools b) { return a.lanes() == b.lanes(); }
  friend MSL_FN msl_bools operator!=(msl_bools a, msl_bools b) { return a.lanes() != b.lanes(); }
};
template <int N> struct msl_shape<msl_bools<N>> {
  typedef bool element;
  static constexpr constant int size = N;
  static constexpr constant bool is_vector = true;
};
template <class T> constexpr constant bool msl_is_bools = false;
template <int N> constexpr constant bool msl_is_bools<msl_bools<N>> = true;

// T(a): a conversion between scalars or vectors, or a class's own constructor.
template <class T, class A> MSL_FN constexpr T msl_convert(A a) {
  typedef typename msl_shape<T>::element E;
  if constexpr (msl_shape<T>::is_vector && msl_shape<A>::is_vector) {
    static_assert(msl_shape<A>::size == msl_shape<T>::size, "conversion between vectors of different sizes");
    if constexpr (msl_is_bools<T>)
      return T(a);
    else if constexpr (msl_is_bools<A>)
      return __builtin_convertvector(a.lanes(), T);
    else if constexpr (msl_half_to_bfloat<E, typename msl_shape<A>::element>)
      return __builtin_convertvector(__builtin_convertvector(a, vec<float, msl_shape<T>::size>), T);
    else if constexpr (is_integral_v<E> && is_floating_point_v<typename msl_shape<A>::element>) {
      T v{};  // lane by lane, since only a scalar keeps to the integer's range
      for (int i = 0; i < msl_shape<T>::size; i++) v[i] = (E)a[i];
      return v;
    } else
      return __builtin_convertvector(a, T);
  } else if constexpr (msl_shape<T>::is_vector && is_arithmetic_v<A>) {
    return (T)(msl_convert<E>(a));
  } else if constexpr (msl_half_to_bfloat<T, A>) {
    return (T)(float)a;
  } else {
    return T(a);
  }
}
template <class T> MSL_FN constexpr T msl_make() { return T{}; }
template <class T, class A> MSL_FN constexpr T msl_make(A a) { return msl_convert<T, msl_bare<A>>(a); }
template <class T, class A, class B, class... R> MSL_FN constexpr T msl_make(A a, B b, R... rest) {
  if constexpr (!msl_shape<T>::is_vector) {
    return T(a, b, rest...);
  } else {
    T v{};
    msl_place_all<T, 0>(v, a, b, rest...);
    return v;
  }
}

// (T)a
template <class T> struct msl_cast_to {
  template <class A> MSL_FN constexpr T operator->*(A a) const { return msl_convert<T, msl_bare<A>>(a); }
};

// A comparison: of vectors it gives lanes of 0 and -1, which become what they mean.
template <class T> MSL_FN constexpr T msl_compared(T a) { return a; }
template <class T, int N> MSL_FN msl_bools<N> msl_compared(vec<T, N> a) { return a; }

// A scalar beside the vector V, as one of its lanes.
template <class V, class S> MSL_FN constexpr make_scalar_t<msl_bare<remove_reference_t<V>>> msl_as_lane(S s) {
  return (make_scalar_t<msl_bare<remove_reference_t<V>>>)s;
}

// c ? a : b
template <class T> MSL_FN constexpr T msl_value(T a) { return a; }

// static_cast<T>(a)
template <class T, class A> MSL_FN constexpr T msl_static_cast(A a) { return msl_convert<T, msl_bare<A>>(a); }

// V v = {a, b}: missing components are zero.
template <class V, int I> MSL_FN constexpr void msl_place_some(thread V&) {
  static_assert(I <= msl_shape<V>::size, "too many initializers for vector");
}
template <class V, int I, class A, class... R> MSL_FN constexpr void msl_place_some(thread V& v, A a, R... rest) {
  msl_place<V, I, A>(v, a);
  msl_place_some<V, I + msl_shape<A>::size>(v, rest...);
}
template <class V, class... R> MSL_FN constexpr V msl_list(R... r) {
  V v{};
  msl_place_some<V, 0>(v, r...);
  return v;
}

// f({a, b}): the parameter's type, a vector or an aggregate, decides.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wc++11-narrowing"
#define MSL_AGGREGATE(...) \
  template <class T, enable_if_t<__is_class(T) || __is_union(T), bool> = true> MSL_FN operator T() const { return T{__VA_ARGS__}; }
template <class A> struct msl_braced1 {
  A a;
  template <class T, enable_if_t<!__is_class(T) && !__is_union(T), bool> = true> MSL_FN operator T() const { return T{a}; }
  MSL_AGGREGATE(a)
};
template <class A, class B> struct msl_braced2 {
  A a; B b;
  template <class T> MSL_FN operator vec<T, 2>() const { return msl_make<vec<T, 2>>(a, b); }
  MSL_AGGREGATE(a, b)
};
template <class A, class B, class C> struct msl_braced3 {
  A a; B b; C c;
  template <class T> MSL_FN operator vec<T, 3>() const { return msl_make<vec<T, 3>>(a, b, c); }
  MSL_AGGREGATE(a, b, c)
};
template <class A, class B, class C, class D> struct msl_braced4 {
  A a; B b; C c; D d;
  template <class T> MSL_FN operator vec<T, 4>() const { return msl_make<vec<T, 4>>(a, b, c, d); }
  MSL_AGGREGATE(a, b, c, d)
};
#pragma clang diagnostic pop
template <class A> MSL_FN msl_braced1<A> msl_braced(A a) { return {a}; }
template <class A, class B> MSL_FN msl_braced2<A, B> msl_braced(A a, B b) { return {a, b}; }
template <class A, class B, class C> MSL_FN msl_braced3<A, B, C> msl_braced(A a, B b, C c) { return {a, b, c}; }
template <class A, class B, class C, class D> MSL_FN msl_braced4<A, B, C, D> msl_braced(A a, B b, C c, D d) {
  return {a, b, c, d};
}

template <class T, class F> MSL_FN constexpr T as_type(F f) {
  static_assert(sizeof(T) == sizeof(F), "as_type between types of different sizes");
  return __builtin_bit_cast(T, f);
}

template <class T, int N> struct msl_packed_lanes;
template <class T> struct msl_packed_lanes<T, 2> { MSL_CONSTRUCTOR(msl_packed_lanes) MSL_COPIES(msl_packed_lanes) MSL_ASSIGNMENTS(msl_packed_lanes) T x, y; };
template <class T> struct msl_packed_lanes<T, 3> { MSL_CONSTRUCTOR(msl_packed_lanes) MSL_COPIES(msl_packed_lanes) MSL_ASSIGNMENTS(msl_packed_lanes) T x, y, z; };
template <class T> struct msl_packed_lanes<T, 4> { MSL_CONSTRUCTOR(msl_packed_lanes) MSL_COPIES(msl_packed_lanes) MSL_ASSIGNMENTS(msl_packed_lanes) T x, y, z, w; };
template <class T, int N> struct msl_packed : msl_packed_lanes<T, N> {
  typedef vec<T, N> V;
  MSL_CONSTRUCTOR(msl_packed) MSL_COPIES(msl_packed) MSL_ASSIGNMENTS(msl_packed)
  MSL_FN msl_packed(V v) { for (int i = 0; i < N; i++) (&this->x)[i] = v[i]; }
  template <class... R> MSL_FN msl_packed(T a, T b, R... rest) : msl_packed_lanes<T, N>{a, b, (T)rest...} {
    static_assert(sizeof...(R) == N - 2, "wrong number of components in vector constructor");
  }
  MSL_FN operator V() const {
    V v;
    for (int i = 0; i < N; i++) v[i] = (*this)[i];
    return v;
  }
  MSL_FN thread T& operator[](int i) thread { return (&this->x)[i]; }
  MSL_FN device T& operator[](int i) device { return (&this->x)[i]; }
  MSL_FN threadgroup T& operator[](int i) threadgroup { return (&this->x)[i]; }
  MSL_FN T operator[](int i) const { return (&this->x)[i]; }
  MSL_FN V operator-() const { return -(V)*this; }
#define MSL_PACKED_OPERATOR(op)                                         \
  friend MSL_FN V operator op(msl_packed a, msl_packed b) { return (V)a op (V)b; } \
  friend MSL_FN V operator op(msl_packed a, T b) { return (V)a op b; }  \
  friend MSL_FN V operator op(T a, msl_packed b) { return a op (V)b; }  \
  friend MSL_FN V operator op(msl_packed a, V b) { return (V)a op b; }  \
  friend MSL_FN V operator op(V a, msl_packed b) { return a op (V)b; }  \
  template <class A> MSL_FN void operator op##=(A a) { *this = msl_packed((V)*this op a); }
  MSL_PACKED_OPERATOR(+) MSL_PACKED_OPERATOR(-) MSL_PACKED_OPERATOR(*) MSL_PACKED_OPERATOR(/)
};
}  // namespace metal
using metal::as_type;
typedef metal::msl_bools<2> bool2;
typedef metal::msl_bools<3> bool3;
typedef metal::msl_bools<4> bool4;

#define MSL_PACKED(T)                            \
  typedef metal::msl_packed<T, 2> packed_##T##2; \
  typedef metal::msl_packed<T, 3> packed_##T##3; \
  typedef metal::msl_packed<T, 4> packed_##T##4;
MSL_PACKED(char) MSL_PACKED(uchar) MSL_PACKED(short) MSL_PACKED(ushort) MSL_PACKED(int) MSL_PACKED(uint)
MSL_PACKED(long) MSL_PACKED(ulong)
MSL_PACKED(half) MSL_PACKED(float) MSL_PACKED(bfloat)
