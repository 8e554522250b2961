// Address spaces, scalar and vector types, and the type traits of metal_type_traits.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#pragma OPENCL EXTENSION __cl_clang_bitfields : enable

#define thread __private
#define device __global
#define threadgroup __local
// Without debug information, so that what happens inside is reported at the kernel's own line.
#define MSL_FN inline __attribute__((always_inline, nodebug))

// clang copies a struct out of constant memory only where the struct says so; it remains an aggregate.
#define MSL_CONSTRUCTOR(S) S() = default;
// The moves take braces: `s = {1, 2};`.
#define MSL_COPIES(S) S(const S&) = default; S(S&&) = default; S(const constant S&) = default;
#define MSL_ASSIGNMENTS(S) \
  S& operator=(const S&) = default; S& operator=(S&&) = default; S& operator=(const constant S&) = default;

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}
#define MSL_VECTORS(T)               \
  typedef metal::vec<T, 2> T##2;     \
  typedef metal::vec<T, 3> T##3;     \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(half) MSL_VECTORS(float) MSL_VECTORS(bfloat)

namespace metal {
template <class T> struct msl_exactly { typedef T type; };
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  MSL_FN constexpr operator T() const { return v; }
  MSL_FN constexpr T operator()() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> struct remove_volatile { typedef T type; };
template <class T> struct remove_volatile<volatile T> { typedef T type; };
template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<thread T> { typedef T type; };
template <class T> struct remove_addrspace<device T> { typedef T type; };
template <class T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <class T> struct remove_addrspace<constant T> { typedef T type; };
template <class T> struct remove_addrspace<__generic T> { typedef T type; };
template <class T> struct remove_cv { typedef typename remove_const<typename remove_volatile<T>::type>::type type; };
template <class T> struct remove_reference { typedef __remove_reference_t(T) type; };
template <class T> struct remove_pointer { typedef __remove_pointer(T) type; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> using msl_bare = remove_cv_t<remove_addrspace_t<remove_cv_t<T>>>;

template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> struct is_floating_point : bool_constant<__is_floating_point(T) || is_same<msl_bare<T>, bfloat>::value> {};
template <class T> struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T> struct is_signed : bool_constant<__is_signed(T) || is_same<msl_bare<T>, bfloat>::value> {};
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T> struct is_enum : bool_constant<__is_enum(T)> {};
template <class T> struct is_void : is_same<msl_bare<T>, void> {};
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T thread*> : true_type {};
template <class T> struct is_pointer<T device*> : true_type {};
template <class T> struct is_pointer<T threadgroup*> : true_type {};
template <class T> struct is_pointer<T constant*> : true_type {};
// No other floating-point type converts to bfloat by itself.
template <class From, class To>
struct is_convertible : bool_constant<!(is_same<msl_bare<To>, bfloat>::value && !is_same<msl_bare<From>, bfloat>::value &&
                                        is_floating_point<From>::value) && __is_convertible_to(From, To)> {};
template <class From, class To> constexpr constant bool is_convertible_v = is_convertible<From, To>::value;
template <class A, class B> constexpr constant bool is_same_v = is_same<A, B>::value;
template <class T> constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T> constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T> constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T> constexpr constant bool is_signed_v = is_signed<T>::value;
template <class T> constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <class T> constexpr constant bool is_enum_v = is_enum<T>::value;
template <class T> constexpr constant bool is_void_v = is_void<T>::value;
template <class T> constexpr constant bool is_pointer_v = is_pointer<T>::value;

template <class...> struct _disjunction : false_type {};
template <class B, class... R> struct _disjunction<B, R...> : bool_constant<B::value || _disjunction<R...>::value> {};
template <class...> struct _conjunction : true_type {};
template <class B, class... R> struct _conjunction<B, R...> : bool_constant<B::value && _conjunction<R...>::value> {};
template <class... B> using disjunction = _disjunction<B...>;
template <class... B> using conjunction = _conjunction<B...>;
template <class B> struct negation : bool_constant<!B::value> {};
template <class... B> constexpr constant bool disjunction_v = disjunction<B...>::value;
template <class... B> constexpr constant bool conjunction_v = conjunction<B...>::value;
template <class T> struct is_const : false_type {};
template <class T> struct is_const<const T> : true_type {};
template <class T> struct is_class : bool_constant<__is_class(T)> {};
template <class T> struct is_union : bool_constant<__is_union(T)> {};
template <class A, class B> struct is_base_of : bool_constant<__is_base_of(A, B)> {};
template <class T> struct is_array : bool_constant<__is_array(T)> {};
template <class T> struct is_reference : bool_constant<__is_reference(T)> {};
template <class T> struct is_scalar : bool_constant<__is_scalar(T)> {};
template <class T> struct is_trivially_copyable : bool_constant<__is_trivially_copyable(T)> {};
template <class T> constexpr constant bool is_class_v = is_class<T>::value;
template <class T> constexpr constant bool is_const_v = is_const<T>::value;
template <class A, class B> constexpr constant bool is_base_of_v = is_base_of<A, B>::value;
template <class T> struct decay { typedef __decay(T) type; };
template <class T> using decay_t = typename decay<T>::type;
template <class T> struct add_const { typedef const T type; };
template <class T> using add_const_t = const T;
template <class T> struct underlying_type { typedef __underlying_type(T) type; };
template <class T> using underlying_type_t = typename underlying_type<T>::type;
template <class T> struct make_unsigned { typedef __make_unsigned(T) type; };
template <class T> struct make_signed { typedef __make_signed(T) type; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <class T> using make_signed_t = typename make_signed<T>::type;
template <class T> MSL_FN constexpr T&& declval();

template <class T> struct msl_shape {
  typedef T element;
  static constexpr constant int size = 1;
  static constexpr constant bool is_vector = false;
};
template <class T, int N> struct msl_shape<T __attribute__((ext_vector_type(N)))> {
  typedef T element;
  static constexpr constant int size = N;
  static constexpr constant bool is_vector = true;
};
template <class T> struct make_scalar { typedef typename msl_shape<T>::element type; };
template <class T> using make_scalar_t = typename make_scalar<T>::type;

template <class T> struct vec_elements : integral_constant<int, msl_shape<T>::size> {};
template <class T, T... I> struct integer_sequence {
  typedef T value_type;
  MSL_FN static constexpr ulong size() { return sizeof...(I); }
};
template <class T, T N> using make_integer_sequence = __make_integer_seq<integer_sequence, T, N>;
template <ulong... I> using index_sequence = integer_sequence<ulong, I...>;
template <ulong N> using make_index_sequence = make_integer_sequence<ulong, N>;

template <class T, ulong N> struct array {
  MSL_CONSTRUCTOR(array) MSL_COPIES(array) MSL_ASSIGNMENTS(array)
  T element_[N];
  MSL_FN thread T& operator[](ulong i) thread { return element_[i]; }
  MSL_FN const thread T& operator[](ulong i) const thread { return element_[i]; }
  MSL_FN device T& operator[](ulong i) device { return element_[i]; }
  MSL_FN const device T& operator[](ulong i) const device { return element_[i]; }
  MSL_FN threadgroup T& operator[](ulong i) threadgroup { return element_[i]; }
  MSL_FN const threadgroup T& operator[](ulong i) const threadgroup { return element_[i]; }
  MSL_FN const constant T& operator[](ulong i) const constant { return element_[i]; }
  MSL_FN constexpr ulong size() const { return N; }
};

template <class T> struct _numeric_limits_impl;
template <class T> struct numeric_limits : _numeric_limits_impl<T> {};
#define MSL_INTEGER_LIMITS(T, MIN, MAX, SIGNED)                                          \
  template <> struct _numeric_limits_impl<T> {                                                 \
    MSL_FN static constexpr T min() { return MIN; }                                      \
    MSL_FN static constexpr T max() { return MAX; }                                      \
    MSL_FN static constexpr T lowest() { return MIN; }                                   \
    MSL_FN static constexpr T infinity() { return 0; }                                   \
    MSL_FN static constexpr T epsilon() { return 0; }                                    \
    static constexpr constant bool is_signed = SIGNED;                                   \
    static constexpr constant bool is_integer = true;                                    \
    static constexpr constant bool has_infinity = false;                                 \
    static constexpr constant int digits = sizeof(T) * 8 - (SIGNED);                     \
  };
MSL_INTEGER_LIMITS(bool, false, true, false)
MSL_INTEGER_LIMITS(char, -128, 127, true)
MSL_INTEGER_LIMITS(signed char, -128, 127, true)
MSL_INTEGER_LIMITS(uchar, 0, 255, false)
MSL_INTEGER_LIMITS(short, -32768, 32767, true)
MSL_INTEGER_LIMITS(ushort, 0, 65535, false)
MSL_INTEGER_LIMITS(int, (-2147483647 - 1), 2147483647, true)
MSL_INTEGER_LIMITS(uint, 0u, 4294967295u, false)
MSL_INTEGER_LIMITS(long, (-9223372036854775807L - 1), 9223372036854775807L, true)
MSL_INTEGER_LIMITS(ulong, 0ul, 18446744073709551615ul, false)
#define MSL_FLOAT_LIMITS(T, MIN, MAX, EPSILON, DIGITS)                                   \
  template <> struct _numeric_limits_impl<T> {                                                 \
    MSL_FN static constexpr T min() { return (T)MIN; }                                   \
    MSL_FN static constexpr T max() { return (T)MAX; }                                   \
    MSL_FN static constexpr T lowest() { return (T)(-MAX); }                             \
    MSL_FN static constexpr T epsilon() { return (T)EPSILON; }                           \
    MSL_FN static constexpr T infinity() { return (T)__builtin_inff(); }                 \
    MSL_FN static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }              \
    static constexpr constant bool is_signed = true;                                     \
    static constexpr constant bool is_integer = false;                                   \
    static constexpr constant bool has_infinity = true;                                  \
    static constexpr constant int digits = DIGITS;                                       \
  };
MSL_FLOAT_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f, 24)
MSL_FLOAT_LIMITS(half, 0x1p-14f, 65504.f, 0x1p-10f, 11)
MSL_FLOAT_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f, 8)
}  // namespace metal
