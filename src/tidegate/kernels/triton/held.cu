// SPDX-License-Identifier: Apache-2.0
// K4: a sequence by several blocks at once, each holding the recurrent weights of its units from first step to last.
//
// Grid: (batch groups, PROGRAMS), all running at once. A block owns UNITS units for the rows of its group, TILES tiles of
// 16: their weights stay in its registers. What a step's product reads of all units is exchanged through memory, where
// each element is written once: forward, the output; backward, the gate gradients. A warp waits for the data itself:
// memory begins as all ones, a NaN that no arithmetic gives, and who reads a word looks again until it is another. So a
// step has no flag, no fence and no barrier among blocks.
//
// The product of a tile is dealt to the warps by its inner dimension; each writes its share to shared memory, and the
// threads, now each with two units of a row, add the shares and do the pointwise part. One barrier a tile and step.
//
// A chunk is what a thread reads of a row at once, 16 bytes, times the four threads that share a row: 32 elements of 16
// bits, or 16 of 32 bits, which the matrix unit takes in two products. Which of a chunk's elements a thread has does not
// matter to a sum, so long as it has the same of both factors.
//
// Compiled at run time; the compiler is given CELL, DTYPE, H, UNITS, TILES, WARPS, KEPT, SKIP, HAS_BIAS, HAS_LENGTHS,
// HAS_RESETS, REVERSE and SPINS. Letters as in cell.py and common.py.

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;

enum { RNN_TANH, RNN_RELU, LSTM, GRU };
enum { BFLOAT16, FLOAT16, TF32 };

constexpr int GATES = CELL == LSTM ? 4 : CELL == GRU ? 3 : 1;
constexpr int COLUMNS = CELL == GRU ? 4 : GATES;                 // gate gradients a unit, the first GATES multiplied
constexpr int ALL_KEPT = CELL == LSTM ? 5 : CELL == GRU ? 4 : 1;  // what the backward reads a unit
constexpr bool HAS_C = CELL == LSTM;
constexpr int WORD = DTYPE == TF32 ? 1 : 2;  // elements a word of 32 bits
constexpr int LANE = 4 * WORD;               // elements that a thread reads of a row at once
constexpr int CHUNK = 4 * LANE;
constexpr int THREADS = 32 * WARPS;
constexpr int PANELS = UNITS / 8;  // of units, as wide as the matrix unit takes
constexpr int PAIRS = UNITS / 2;
constexpr int TASKS = (16 * PAIRS + THREADS - 1) / THREADS;  // pairs of units that a thread has of a tile
constexpr int STRIDE = UNITS + 8;                            // of a row of sums in shared memory: fewer bank conflicts
constexpr int AT_ONCE = 8;                                   // chunks of a row that a thread of the backward has
constexpr u32 UNSET = 0xffffffffu;

// ---- Elements ----

__device__ __forceinline__ float2 unpacked(u32 word) {
  float2 pair;
  if (DTYPE == BFLOAT16) {
    pair = make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(pair.x), "=f"(pair.y) : "r"(word));
  }
  return pair;
}

__device__ __forceinline__ u32 packed(float2 pair) {
  u32 word;
  if (DTYPE == BFLOAT16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  }
  return word;
}

// Two neighbouring elements, at an even index.
__device__ __forceinline__ float2 load_pair(const u32* memory, i64 index) {
  if (DTYPE == TF32) return *(const float2*)(memory + index);
  return unpacked(memory[index / 2]);
}

__device__ __forceinline__ void store_pair(u32* memory, i64 index, float2 pair) {
  if (DTYPE == TF32) {
    *(float2*)(memory + index) = pair;
  } else {
    memory[index / 2] = packed(pair);
  }
}

// As the matrix unit takes it: tf32 is rounded.
__device__ __forceinline__ u32 factor(u32 word) {
  if (DTYPE == TF32) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
  return word;
}

__device__ __forceinline__ uint4 factors(uint4 words) {
  return make_uint4(factor(words.x), factor(words.y), factor(words.z), factor(words.w));
}

// A word of column `column` from the rows row, row + 1 (one of them for tf32) of w (., H).
__device__ __forceinline__ u32 load_column(const u32* w, i64 row, int column) {
  if (DTYPE == TF32) return factor(w[row * H + column]);
  const unsigned short* narrow = (const unsigned short*)w;
  return narrow[row * H + column] | (u32)narrow[(row + 1) * H + column] << 16;
}

// ---- The matrix unit: sums (16, 8) += a chunk's half of rows times a chunk's half of units ----

__device__ __forceinline__ void multiply(float4& sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#define MULTIPLY(shape, type)                                                        \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 "       \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"               \
               : "+f"(sums.x), "+f"(sums.y), "+f"(sums.z), "+f"(sums.w)              \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if (DTYPE == BFLOAT16) MULTIPLY("m16n8k16", "bf16");
  if (DTYPE == FLOAT16) MULTIPLY("m16n8k16", "f16");
  if (DTYPE == TF32) MULTIPLY("m16n8k8", "tf32");
}

__device__ __forceinline__ void multiply_chunk(float4& sums, uint4 upper, uint4 lower, uint4 weights) {
  multiply(sums, upper.x, lower.x, upper.y, lower.y, weights.x, weights.y);
  multiply(sums, upper.z, lower.z, upper.w, lower.w, weights.z, weights.w);
}

// ---- The exchange ----

__device__ __forceinline__ uint4 look(const u32* word) {
  uint4 found;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w) : "l"(word));
  return found;
}

__device__ __forceinline__ bool is_unset(uint4 words) {
  return max(max(words.x, words.y), max(words.z, words.w)) == UNSET;
}

// One of the two rows of a tile that a thread reads for the product.
struct Source {
  const u32* row;  // of its elements; null if there is none
  bool awaited;    // others write it while this kernel runs
  bool cut;        // it counts as zeros: known later than where it lies
};

__device__ __forceinline__ const u32* at(const u32* row, int element) { return row + element / WORD; }

// COUNT chunks of both rows when all of them have arrived. first(k): where one begins in a row, -1 for none.
template <int COUNT, typename First>
__device__ __forceinline__ void await(uint4 (&a)[COUNT][2], const Source (&sources)[2], First first) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) a[k][j] = sources[j].row && first(k) >= 0 ? look(at(sources[j].row, first(k))) : zero;
  }
  for (int looks = 0;; ++looks) {
    bool missing = false;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (sources[j].awaited && is_unset(a[k][j])) {
          a[k][j] = look(at(sources[j].row, first(k)));
          missing = true;
        }
      }
    }
    if (!__any_sync(0xffffffffu, missing)) break;
    if (looks == SPINS) asm volatile("trap;");
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) a[k][j] = HAS_RESETS && sources[j].cut ? zero : factors(a[k][j]);
  }
}

// ---- Which rows have a step at t, and which enter it with zeros ----

struct Rows {
  const i64* lengths;
  const u8* resets;
  int T, B;

  __device__ __forceinline__ int valid(int row) const {
    if (row >= B) return 0;
    return HAS_LENGTHS ? (int)lengths[row] : T;
  }
  // The state entering step t is zero: marked at t or, in reverse, at t + 1 within the length.
  __device__ __forceinline__ bool fresh(int t, int row, int valid) const {
    if (!HAS_RESETS) return false;
    int marked = t + REVERSE;
    return t < valid && marked < valid && resets[(i64)marked * B + row] != 0;
  }
  __device__ __forceinline__ int last(int first_row) const {
    if (!HAS_LENGTHS) return T;
    int most = 0;
    for (int row = first_row; row < min(B, first_row + 16 * TILES); ++row) most = max(most, valid(row));
    return most;
  }
};

__device__ __forceinline__ int time_of(int step, int last) { return REVERSE ? last - 1 - step : step; }

// ---- Cells: functions of one unit. xs, as: the input's and the recurrent product of each gate, biases added ----

__device__ __forceinline__ float sigmoid(float x) {
  float e = __expf(-fabsf(x));
  return __fdividef(x >= 0 ? 1.0f : e, 1.0f + e);
}

__device__ __forceinline__ float squash(float x) {
  float e = __expf(-2.0f * fabsf(x)), y = x * x;
  float far = copysignf(__fdividef(1.0f - e, 1.0f + e), x);
  // 1 - e cancels near 0: there the series, whose next term is below 2e-8 of the value.
  float near = -0.3333333333f + y * (0.1333333333f + y * (-0.05396825397f + y * (0.02186948854f - y * 0.008863235530f)));
  return fabsf(x) < 0.35f ? x + x * y * near : far;
}

__device__ __forceinline__ float cell_forward(
    const float (&xs)[GATES], const float (&as)[GATES], float h, float& c, float (&kept)[ALL_KEPT]) {
  if (CELL == GRU) {
    float r = sigmoid(xs[0] + as[0]), z = sigmoid(xs[1] + as[1]), n = squash(xs[2] + r * as[2]);
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = as[2];
    return fmaf(z, h - n, n);
  }
  if (CELL == LSTM) {
    float i = sigmoid(xs[0] + as[0]), f = sigmoid(xs[1] + as[1]), g = squash(xs[2] + as[2]), o = sigmoid(xs[3] + as[3]);
    c = f * c + i * g;
    kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o, kept[4] = c;
    return o * squash(c);
  }
  float sum = xs[0] + as[0];
  float h_new = CELL == RNN_TANH ? squash(sum) : sum > 0 || sum != sum ? sum : 0.0f;
  kept[0] = h_new;
  return h_new;
}

// The gate gradients; becomes what reaches h without a product, and c.
__device__ __forceinline__ void cell_backward(
    float& dh, float& dc, const float (&kept)[ALL_KEPT], float h_before, float c_before, float (&gates)[COLUMNS]) {
  if (CELL == GRU) {
    float r = kept[0], z = kept[1], n = kept[2], a_n = kept[3];
    float dn = dh * (1.0f - z) * (1.0f - n * n);
    gates[0] = dn * r;
    gates[1] = dn * a_n * r * (1.0f - r), gates[2] = dh * (h_before - n) * z * (1.0f - z), gates[3] = dn;
    dh *= z;
  } else if (CELL == LSTM) {
    float i = kept[0], f = kept[1], g = kept[2], o = kept[3], squashed = squash(kept[4]);
    dc += dh * o * (1.0f - squashed * squashed);
    gates[0] = dc * g * i * (1.0f - i), gates[1] = dc * c_before * f * (1.0f - f);
    gates[2] = dc * i * (1.0f - g * g), gates[3] = dh * squashed * o * (1.0f - o);
    dh = 0, dc *= f;
  } else {
    gates[0] = CELL == RNN_TANH ? dh * (1.0f - kept[0] * kept[0]) : kept[0] > 0 ? dh : 0.0f;
    dh = 0;
  }
}

// ---- A thread's pairs of units ----

struct Task {
  int tile_row;  // in the tile
  int unit;      // the first of two
  bool exists;
};

__device__ __forceinline__ Task task_of(int number) {
  int index = number * THREADS + threadIdx.x;
  return {index / PAIRS, 2 * (index % PAIRS), index < 16 * PAIRS};
}

// Sums of one gate over the warps' shares: shares (WARPS, SUMS, 16, STRIDE).
template <int SUMS>
__device__ __forceinline__ float2 total(const float* shares, int sum, Task task) {
  float2 found = make_float2(0, 0);
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) {
    float2 share = *(const float2*)(shares + ((warp * SUMS + sum) * 16 + task.tile_row) * STRIDE + task.unit);
    found.x += share.x, found.y += share.y;
  }
  return found;
}

template <int SUMS>
__device__ __forceinline__ void put(float* shares, int warp, int sum, int panel, float4 sums) {
  int lane = threadIdx.x % 32;
  float* place = shares + ((warp * SUMS + sum) * 16 + lane / 4) * STRIDE + 8 * panel + 2 * (lane % 4);
  *(float2*)place = make_float2(sums.x, sums.y);
  *(float2*)(place + 8 * STRIDE) = make_float2(sums.z, sums.w);
}

__device__ __forceinline__ float& half(float2& pair, int k) { return k ? pair.y : pair.x; }

extern __shared__ float shared[];

// x (T, B, G*H) is the input's product; `out` (T, B, H) begins unset, and is zero past a row's length afterwards; kept
// (T, B, KEPT*H) receives the cell's kept values after the first SKIP.
extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(
    const u32* x, const u32* w, const u32* bias, const i64* lengths, const u8* resets, const u32* h_0, const u32* c_0,
    u32* h_n, u32* c_n, u32* out, u32* kept, int T, int B) {
  constexpr int CHUNKS = (H + CHUNK - 1) / CHUNK;
  constexpr int SHARE = (CHUNKS + WARPS - 1) / WARPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * 16 * TILES, first_unit = blockIdx.y * UNITS;
  const Rows rows{lengths, resets, T, B};
  const int last = rows.last(first_row);
  auto element = [&](int k) {
    int found = (warp * SHARE + k) * CHUNK + lane % 4 * LANE;
    return SHARE * WARPS * CHUNK == H || found < H ? found : -1;
  };

  uint4 weights[SHARE][GATES][PANELS];
#pragma unroll
  for (int k = 0; k < SHARE; ++k) {
#pragma unroll
    for (int g = 0; g < GATES; ++g) {
#pragma unroll
      for (int p = 0; p < PANELS; ++p) {
        int unit = first_unit + 8 * p + lane / 4;
        bool there = element(k) >= 0 && unit < H;
        const u32* row = w + (i64)(g * H + (there ? unit : 0)) * (H / WORD);
        weights[k][g][p] = there ? factors(*(const uint4*)at(row, element(k))) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  float2 biases[TASKS][GATES], h[TILES][TASKS], c[TILES][TASKS];
#pragma unroll
  for (int i = 0; i < TASKS; ++i) {
    Task task = task_of(i);
    int unit = first_unit + task.unit;
#pragma unroll
    for (int g = 0; g < GATES; ++g) {
      bool there = HAS_BIAS && task.exists && unit < H;
      biases[i][g] = there ? load_pair(bias, g * H + unit) : make_float2(0, 0);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      int row = first_row + 16 * tile + task.tile_row;
      bool there = task.exists && row < B && unit < H;
      h[tile][i] = there ? load_pair(h_0, (i64)row * H + unit) : make_float2(0, 0);
      c[tile][i] = HAS_C && there ? load_pair(c_0, (i64)row * H + unit) : make_float2(0, 0);
    }
  }

  int turn = 0;
  for (int step = 0; step < last; ++step) {
    const int t = time_of(step, last), t_before = t - 1 + 2 * REVERSE;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile, turn ^= 1) {
      float* shares = shared + turn * (WARPS * GATES * 16 * STRIDE);
      // What only this thread reads is on its way while the exchange is awaited.
      float2 xs[TASKS][GATES];
      bool active[TASKS], fresh[TASKS];
#pragma unroll
      for (int i = 0; i < TASKS; ++i) {
        Task task = task_of(i);
        int row = first_row + 16 * tile + task.tile_row, unit = first_unit + task.unit;
        int valid = task.exists && unit < H ? rows.valid(row) : 0;
        active[i] = t < valid;
        fresh[i] = active[i] && rows.fresh(t, row, valid);
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
          i64 place = ((i64)t * B + row) * (GATES * H) + g * H + unit;
          xs[i][g] = active[i] ? load_pair(x, place) : make_float2(0, 0);
        }
      }

      Source sources[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int row = first_row + 16 * tile + lane / 4 + 8 * j, valid = rows.valid(row);
        bool begins = t_before < 0 || t_before >= valid;
        bool enters = t < valid;
        const u32* from = begins ? h_0 + (i64)row * (H / WORD) : out + ((i64)t_before * B + row) * (H / WORD);
        sources[j] = {enters ? from : nullptr, enters && !begins, rows.fresh(t, row, valid)};
      }
      uint4 a[SHARE][2];
      await<SHARE>(a, sources, element);
      float4 sums[GATES][PANELS] = {};
#pragma unroll
      for (int k = 0; k < SHARE; ++k) {
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
#pragma unroll
          for (int p = 0; p < PANELS; ++p) multiply_chunk(sums[g][p], a[k][0], a[k][1], weights[k][g][p]);
        }
      }
#pragma unroll
      for (int g = 0; g < GATES; ++g) {
#pragma unroll
        for (int p = 0; p < PANELS; ++p) put<GATES>(shares, warp, g, p, sums[g][p]);
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < TASKS; ++i) {
        Task task = task_of(i);
        int row = first_row + 16 * tile + task.tile_row, unit = first_unit + task.unit;
        if (!(task.exists && row < B && unit < H)) continue;
        i64 place = (i64)t * B + row;
        if (!active[i]) {
          store_pair(out, place * H + unit, make_float2(0, 0));
          continue;
        }
        float2 as[GATES], keep[ALL_KEPT];
#pragma unroll
        for (int g = 0; g < GATES; ++g) {
          as[g] = total<GATES>(shares, g, task);
          as[g].x += biases[i][g].x, as[g].y += biases[i][g].y;
        }
        if (fresh[i]) h[tile][i] = c[tile][i] = make_float2(0, 0);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float x_k[GATES], a_k[GATES], keep_k[ALL_KEPT];
#pragma unroll
          for (int g = 0; g < GATES; ++g) x_k[g] = half(xs[i][g], k), a_k[g] = half(as[g], k);
          half(h[tile][i], k) = cell_forward(x_k, a_k, half(h[tile][i], k), half(c[tile][i], k), keep_k);
#pragma unroll
          for (int n = 0; n < ALL_KEPT; ++n) half(keep[n], k) = keep_k[n];
        }
        store_pair(out, place * H + unit, h[tile][i]);  // first: others wait for it
#pragma unroll
        for (int n = 0; n < KEPT; ++n) store_pair(kept, place * (KEPT * H) + n * H + unit, keep[SKIP + n]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < TASKS; ++i) {
    Task task = task_of(i);
    int unit = first_unit + task.unit;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      int row = first_row + 16 * tile + task.tile_row;
      if (!(task.exists && row < B && unit < H)) continue;
      store_pair(h_n, (i64)row * H + unit, h[tile][i]);
      if (HAS_C) store_pair(c_n, (i64)row * H + unit, c[tile][i]);
      for (int t = last; t < T; ++t) store_pair(out, ((i64)t * B + row) * H + unit, make_float2(0, 0));
    }
  }
}

// `dgates` (T, B, COLUMNS*H) begins unset, and is zero past a row's length afterwards. Step `last` is one more product,
// which gives dh_0.
extern "C" __global__ void __launch_bounds__(THREADS, 1) backward(
    const u32* w, const u32* kept, const u32* h_before, const u32* c_before, const u32* dout, const i64* lengths,
    const u8* resets, const u32* dh_n, const u32* dc_n, u32* dgates, u32* dh_0, u32* dc_0, int T, int B) {
  constexpr int CHUNKS = (H + CHUNK - 1) / CHUNK;  // of a gate
  // Awaited a part at a time, which takes fewer registers.
  constexpr int PARTS = ((GATES * CHUNKS + WARPS - 1) / WARPS + AT_ONCE - 1) / AT_ONCE;
  constexpr int PART = (GATES * CHUNKS + WARPS * PARTS - 1) / (WARPS * PARTS);
  constexpr int SHARE = PARTS * PART;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = blockIdx.x * 16 * TILES, first_unit = blockIdx.y * UNITS;
  const Rows rows{lengths, resets, T, B};
  const int last = rows.last(first_row);
  auto element = [&](int k) {
    int number = warp * SHARE + k, within = lane % 4 * LANE;
    if (H % CHUNK == 0) {
      return SHARE * WARPS == GATES * CHUNKS || number < GATES * CHUNKS ? number * CHUNK + within : -1;
    }
    int gate = number / CHUNKS, inner = number % CHUNKS * CHUNK + within;
    return gate < GATES && inner < H ? gate * H + inner : -1;
  };

  uint4 weights[SHARE][PANELS];
#pragma unroll
  for (int k = 0; k < SHARE; ++k) {
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
      int unit = first_unit + 8 * p + lane / 4;
      uint4 words = make_uint4(0, 0, 0, 0);
      if (element(k) >= 0 && unit < H) {
        // Of a GRU's gate gradients the last gate's comes first. H is a multiple of LANE: these rows are of one gate.
        int row = CELL == GRU ? (element(k) + 2 * H) % (3 * H) : element(k);
        words.x = load_column(w, row, unit);
        words.y = load_column(w, row + WORD, unit);
        words.z = load_column(w, row + 2 * WORD, unit);
        words.w = load_column(w, row + 3 * WORD, unit);
      }
      weights[k][p] = words;
    }
  }
  float2 dh[TILES][TASKS], dc[TILES][TASKS];
#pragma unroll
  for (int i = 0; i < TASKS; ++i) {
    Task task = task_of(i);
    int unit = first_unit + task.unit;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      int row = first_row + 16 * tile + task.tile_row;
      bool there = task.exists && row < B && unit < H;
      dh[tile][i] = there ? load_pair(dh_n, (i64)row * H + unit) : make_float2(0, 0);
      dc[tile][i] = HAS_C && there ? load_pair(dc_n, (i64)row * H + unit) : make_float2(0, 0);
    }
  }

  int turn = 0;
  for (int step = 0; step <= last; ++step) {
    const int t = time_of(last - 1 - step, last), t_done = time_of(last - step, last);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile, turn ^= 1) {
      float* shares = shared + turn * (WARPS * 16 * STRIDE);
      float2 keep[TASKS][ALL_KEPT], before[TASKS], old_c[TASKS], dy[TASKS];
      bool active[TASKS], fresh[TASKS];
#pragma unroll
      for (int i = 0; i < TASKS; ++i) {
        Task task = task_of(i);
        int row = first_row + 16 * tile + task.tile_row, unit = first_unit + task.unit;
        int valid = task.exists && unit < H ? rows.valid(row) : 0;
        active[i] = step < last && t < valid;
        fresh[i] = active[i] && rows.fresh(t, row, valid);
        i64 place = (i64)t * B + row;
        if (active[i]) {
#pragma unroll
          for (int n = 0; n < ALL_KEPT; ++n) keep[i][n] = load_pair(kept, place * (ALL_KEPT * H) + n * H + unit);
          before[i] = load_pair(h_before, place * H + unit);
          if (HAS_C) old_c[i] = load_pair(c_before, place * H + unit);
          dy[i] = load_pair(dout, place * H + unit);
        }
      }

      if (step > 0) {
        Source sources[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int row = first_row + 16 * tile + lane / 4 + 8 * j, valid = rows.valid(row);
          bool leaves = t_done < valid;
          const u32* from = dgates + ((i64)t_done * B + row) * (COLUMNS * H / WORD);
          sources[j] = {leaves ? from : nullptr, leaves, rows.fresh(t_done, row, valid)};
        }
        float4 sums[PANELS] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          uint4 a[PART][2];
          await<PART>(a, sources, [&](int k) { return element(part * PART + k); });
#pragma unroll
          for (int k = 0; k < PART; ++k) {
#pragma unroll
            for (int p = 0; p < PANELS; ++p) multiply_chunk(sums[p], a[k][0], a[k][1], weights[part * PART + k][p]);
          }
        }
#pragma unroll
        for (int p = 0; p < PANELS; ++p) put<1>(shares, warp, 0, p, sums[p]);
        __syncthreads();
      }

#pragma unroll
      for (int i = 0; i < TASKS; ++i) {
        Task task = task_of(i);
        int row = first_row + 16 * tile + task.tile_row, unit = first_unit + task.unit;
        if (!(task.exists && row < B && unit < H)) continue;
        if (step > 0) {
          float2 sum = total<1>(shares, 0, task);
          dh[tile][i].x += sum.x, dh[tile][i].y += sum.y;
        }
        if (step == last) {
          store_pair(dh_0, (i64)row * H + unit, dh[tile][i]);
          if (HAS_C) store_pair(dc_0, (i64)row * H + unit, dc[tile][i]);
          continue;
        }
        float2 found[COLUMNS];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) found[n] = make_float2(0, 0);
        if (active[i]) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float keep_k[ALL_KEPT], gates[COLUMNS];
#pragma unroll
            for (int n = 0; n < ALL_KEPT; ++n) keep_k[n] = half(keep[i][n], k);
            float dh_k = half(dh[tile][i], k) + half(dy[i], k), dc_k = half(dc[tile][i], k);
            cell_backward(dh_k, dc_k, keep_k, half(before[i], k), HAS_C ? half(old_c[i], k) : 0.0f, gates);
            half(dh[tile][i], k) = fresh[i] ? 0.0f : dh_k;
            half(dc[tile][i], k) = fresh[i] ? 0.0f : dc_k;
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) half(found[n], k) = gates[n];
          }
        }
        i64 place = ((i64)t * B + row) * (COLUMNS * H) + unit;
        // Those that others wait for first.
#pragma unroll
        for (int n = COLUMNS - 1; n >= 0; --n) store_pair(dgates, place + n * H, found[n]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < TASKS; ++i) {
    Task task = task_of(i);
    int unit = first_unit + task.unit;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      int row = first_row + 16 * tile + task.tile_row;
      if (!(task.exists && row < B && unit < H)) continue;
      for (int t = last; t < T; ++t) {
        i64 place = ((i64)t * B + row) * (COLUMNS * H) + unit;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) store_pair(dgates, place + n * H, make_float2(0, 0));
      }
    }
  }
}
