// What both operators on bits do with the planes of a group of channels, a phase a function.
//
// A phase reads what another wrote only after a sync between them, which is the caller's. Loops over a member's cells
// are not unrolled for a GPU: what that takes in registers would halve the blocks that a multiprocessor holds.
#pragma once

#include "bitwise_residual_quantize/lanes.h"
#include "common/resample.h"
#include "common/team.h"

namespace fastvar::bitwise {

constexpr int64_t MOST_CHANNELS = INT32_MAX - 8;  // counted in eights
constexpr int32_t kThreads = 512;                 // of a CUDA block, at most

// A member's share of an image: the rows row, row + rows, ... and in them the columns column, column + columns, ... A
// team of more than 32 is a multiple of 32.
struct Share {
  int32_t row, rows, column, columns;

  template <typename Team>
  FASTVAR_HOST_DEVICE inline explicit Share(const Team& team)
      : row(team.rank() / (team.size() < 32 ? team.size() : 32)),
        rows(team.size() < 32 ? 1 : team.size() / 32),
        column(team.rank() % (team.size() < 32 ? team.size() : 32)),
        columns(team.size() < 32 ? team.size() : 32) {}
};

struct Size {
  int32_t height, width;

  FASTVAR_HOST_DEVICE inline int32_t cells() const { return height * width; }
  FASTVAR_HOST_DEVICE inline bool operator==(const Size& other) const {
    return height == other.height && width == other.width;
  }
};

// A CUDA block has a thread for each cell, up to a limit: a multiple of 32.
inline int32_t block_threads(Size finest) {
  const int32_t threads = (finest.cells() + 31) / 32 * 32;
  return threads < kThreads ? threads : kThreads;
}

// Taps and bins between the finest grid and one of the others, which is no larger.
struct Tables {
  Bin *bin_rows, *bin_columns;        // (h,), (w,): area, from the finest grid
  Taps<2> *down_rows, *down_columns;  // (h,), (w,): bilinear, from the finest grid
  Taps<2> *up_rows, *up_columns;      // (H,), (W,): bilinear, to the finest grid

  // A multiple of 64, so that what follows in memory is aligned for any vector.
  FASTVAR_HOST_DEVICE static inline int64_t bytes(Size finest) {
    const int64_t entries = int64_t(finest.height) + finest.width;
    return (entries * int64_t(sizeof(Bin) + 2 * sizeof(Taps<2>)) + 63) / 64 * 64;
  }

  FASTVAR_HOST_DEVICE inline Tables(void* memory, Size finest) {
    down_rows = static_cast<Taps<2>*>(memory);
    down_columns = down_rows + finest.height;
    up_rows = down_columns + finest.width;
    up_columns = up_rows + finest.height;
    bin_rows = reinterpret_cast<Bin*>(up_columns + finest.width);
    bin_columns = bin_rows + finest.height;
  }
};

// What a group needs while it is at work, in one piece of memory.
template <typename V>
struct Scratch {
  void* tables;
  V* map;     // (H, W): the feature map
  V* codes;   // (h, w)
  V* wide;    // (h, W): sums over rows, or codes that are upsampled along rows
  V* target;  // (H, W): the features; there only if there are four planes

  FASTVAR_HOST_DEVICE static inline int64_t bytes(Size finest, int32_t planes) {
    return Tables::bytes(finest) + planes * int64_t(finest.cells()) * int64_t(sizeof(V));
  }

  FASTVAR_HOST_DEVICE inline Scratch(void* memory, Size finest) : tables(memory) {
    map = reinterpret_cast<V*>(static_cast<char*>(memory) + Tables::bytes(finest));
    codes = map + finest.cells();
    wide = codes + finest.cells();
    target = wide + finest.cells();
  }
};

// For codes of a grid that are brought to the finest one.
template <typename Team>
FASTVAR_HOST_DEVICE inline void fill_up(const Team& team, Size grid, Size finest, const Tables& tables) {
  for (int32_t i = team.rank(); i < finest.height; i += team.size()) {
    tables.up_rows[i] = linear_taps(i, grid.height, finest.height);
  }
  for (int32_t i = team.rank(); i < finest.width; i += team.size()) {
    tables.up_columns[i] = linear_taps(i, grid.width, finest.width);
  }
}

// For a map or a residual that is brought to a grid.
template <typename Team>
FASTVAR_HOST_DEVICE inline void fill_down(const Team& team, Size grid, Size finest, const Tables& tables) {
  for (int32_t i = team.rank(); i < grid.height; i += team.size()) {
    tables.bin_rows[i] = area_bin(i, finest.height, grid.height);
    tables.down_rows[i] = linear_taps(i, finest.height, grid.height);
  }
  for (int32_t i = team.rank(); i < grid.width; i += team.size()) {
    tables.bin_columns[i] = area_bin(i, finest.width, grid.width);
    tables.down_columns[i] = linear_taps(i, finest.width, grid.width);
  }
}

// wide (h, W): the sums over each bin of rows, of target - map if MINUS, otherwise of map.
template <bool MINUS, typename V>
FASTVAR_HOST_DEVICE inline void sum_rows(const Share& share, Size grid, Size finest, const Tables& tables,
                                         const Scratch<V>& scratch) {
  for (int32_t i = share.row; i < grid.height; i += share.rows) {
    const Bin bin = tables.bin_rows[i];
#pragma unroll 1
    for (int32_t x = share.column; x < finest.width; x += share.columns) {
      V sum{};
      for (int32_t y = bin.first; y < bin.end; ++y) {
        const int32_t at = y * finest.width + x;
        sum += MINUS ? scratch.target[at] - scratch.map[at] : scratch.map[at];
      }
      scratch.wide[i * finest.width + x] = sum;
    }
  }
}

// The sum over a bin of columns of row i of wide.
template <typename V>
FASTVAR_HOST_DEVICE inline V sum_columns(const V* wide, int32_t i, Bin bin, int32_t width) {
  V sum{};
  for (int32_t x = bin.first; x < bin.end; ++x) sum += wide[i * width + x];
  return sum;
}

// out (h w, depth): the means over the bins, from the sums over rows in wide.
template <typename V>
FASTVAR_HOST_DEVICE inline void put_means(const Share& share, Size grid, Size finest, const Tables& tables,
                                          const V* wide, float* out, int64_t depth, int32_t channels) {
  for (int32_t i = share.row; i < grid.height; i += share.rows) {
    const Bin rows = tables.bin_rows[i];
#pragma unroll 1
    for (int32_t j = share.column; j < grid.width; j += share.columns) {
      const Bin columns = tables.bin_columns[j];
      const V sum = sum_columns(wide, i, columns, finest.width);
      const float cells = float((rows.end - rows.first) * (columns.end - columns.first));
      put(sum / cells, out + (int64_t(i) * grid.width + j) * depth, channels);
    }
  }
}

// out (h w, depth): the map, bilinear.
template <typename V>
FASTVAR_HOST_DEVICE inline void put_samples(const Share& share, Size grid, Size finest, const Tables& tables,
                                            const V* map, float* out, int64_t depth, int32_t channels) {
  const bool same = grid == finest;  // then nothing is multiplied: infinity times zero is not zero
  for (int32_t i = share.row; i < grid.height; i += share.rows) {
    const Taps<2> rows = tables.down_rows[i];
    const V *top = map + rows.index[0] * finest.width, *bottom = map + rows.index[1] * finest.width;
#pragma unroll 1
    for (int32_t j = share.column; j < grid.width; j += share.columns) {
      const Taps<2> columns = tables.down_columns[j];
      const int32_t left = columns.index[0], right = columns.index[1];
      const V above = top[left] * columns.weight[0] + top[right] * columns.weight[1];
      const V under = bottom[left] * columns.weight[0] + bottom[right] * columns.weight[1];
      const V mixed = above * rows.weight[0] + under * rows.weight[1];
      put(same ? top[j] : mixed, out + (int64_t(i) * grid.width + j) * depth, channels);
    }
  }
}

// wide (h, W): the codes, bilinear along rows.
template <typename V>
FASTVAR_HOST_DEVICE inline void widen(const Share& share, Size grid, Size finest, const Tables& tables,
                                      const Scratch<V>& scratch) {
  for (int32_t i = share.row; i < grid.height; i += share.rows) {
    const V* row = scratch.codes + i * grid.width;
#pragma unroll 1
    for (int32_t x = share.column; x < finest.width; x += share.columns) {
      const Taps<2> taps = tables.up_columns[x];
      scratch.wide[i * finest.width + x] = row[taps.index[0]] * taps.weight[0] + row[taps.index[1]] * taps.weight[1];
    }
  }
}

// map += what wide makes, bilinear along columns.
template <typename V>
FASTVAR_HOST_DEVICE inline void add(const Share& share, Size finest, const Tables& tables, const Scratch<V>& scratch) {
  for (int32_t y = share.row; y < finest.height; y += share.rows) {
    const Taps<2> taps = tables.up_rows[y];
    const V *top = scratch.wide + taps.index[0] * finest.width, *bottom = scratch.wide + taps.index[1] * finest.width;
#pragma unroll 1
    for (int32_t x = share.column; x < finest.width; x += share.columns) {
      scratch.map[y * finest.width + x] += top[x] * taps.weight[0] + bottom[x] * taps.weight[1];
    }
  }
}

}  // namespace fastvar::bitwise
