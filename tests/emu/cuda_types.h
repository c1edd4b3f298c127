// dim3 and the vector types of CUDA, with CUDA's alignments and make_ functions.
#pragma once
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// name1 .. name4 without the three-component type, which is apart for uint3's sake.
#define EMULATOR_VECTORS(name, T, align4)                    \
  struct name##1 { T x; };                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##1 make_##name##1(T x) { return {x}; }         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define EMULATOR_VECTOR3(name, T) \
  struct name##3 { T x, y, z; };  \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }

EMULATOR_VECTORS(char, signed char, 4)
EMULATOR_VECTORS(uchar, unsigned char, 4)
EMULATOR_VECTORS(short, short, 8)
EMULATOR_VECTORS(ushort, unsigned short, 8)
EMULATOR_VECTORS(int, int, 16)
EMULATOR_VECTORS(uint, unsigned, 16)
EMULATOR_VECTORS(longlong, long long, 16)
EMULATOR_VECTORS(ulonglong, unsigned long long, 16)
EMULATOR_VECTORS(float, float, 16)
EMULATOR_VECTORS(double, double, 16)
EMULATOR_VECTOR3(char, signed char)
EMULATOR_VECTOR3(uchar, unsigned char)
EMULATOR_VECTOR3(short, short)
EMULATOR_VECTOR3(ushort, unsigned short)
EMULATOR_VECTOR3(int, int)
EMULATOR_VECTOR3(longlong, long long)
EMULATOR_VECTOR3(ulonglong, unsigned long long)
EMULATOR_VECTOR3(float, float)
EMULATOR_VECTOR3(double, double)

#undef EMULATOR_VECTORS
#undef EMULATOR_VECTOR3
