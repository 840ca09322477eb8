// The only file that knows Python: checks what comes, takes pointers, releases the GIL, calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <system_error>

#include "covariance.h"
#include "dispatch.h"
#include "file_map.h"
#include "file_read.h"
#include "file_transform.h"
#include "ids.h"
#include "moments.h"
#include "pickle_scan.h"
#include "row_transform.h"
#include "stages.h"
#include "xxh64.h"

namespace py = pybind11;

namespace realign {
namespace {

std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

[[noreturn]] void wrong_dtype(const char* name, const std::string& expected, const py::array& array) {
  throw py::type_error(std::string(name) + " must be " + expected + ", got " + std::string(py::str(array.dtype())));
}

Dtype row_dtype(const py::array& array, bool bfloat16, const char* name) {
  const py::dtype dtype = array.dtype();
  const char kind = dtype.kind();
  const py::ssize_t size = dtype.itemsize();
  const bool native = py::cast<bool>(dtype.attr("isnative"));
  if (native && bfloat16 && kind == 'u' && size == 2) return kBfloat16;
  if (native && !bfloat16 && kind == 'f' && size == 2) return kFloat16;
  if (native && !bfloat16 && kind == 'f' && size == 4) return kFloat32;
  if (native && !bfloat16 && kind == 'f' && size == 8) return kFloat64;
  wrong_dtype(name, bfloat16 ? "uint16 holding bfloat16" : "float16, float32 or float64 in native byte order", array);
}

Rows rows_of(const py::array& array, bool bfloat16, const char* name) {
  const Dtype dtype = row_dtype(array, bfloat16, name);
  if (array.ndim() != 2 || array.shape(1) < 1)
    throw py::value_error(std::string(name) + " must have shape (n, dim) with dim of at least 1, got " +
                          shape_of(array));
  if (array.shape(1) > 1 && array.shape(0) > 0 && array.strides(1) != array.itemsize())
    throw py::value_error(std::string(name) + " must have a contiguous last axis, got a stride of " +
                          std::to_string(array.strides(1)) + " bytes");
  // The stride of a row by itself is whatever NumPy has left there.
  const int64_t stride = array.shape(0) > 1 ? array.strides(0) : array.shape(1) * array.itemsize();
  return {{static_cast<const char*>(array.data()), stride, array.shape(0), array.shape(1)}, dtype};
}

// A one-dimensional C-contiguous array of T and of this size.
template <typename T>
T* vector_of(const py::array& array, int64_t size, const char* name, bool writeable) {
  if (!py::isinstance<py::array_t<T>>(array)) wrong_dtype(name, std::string(py::str(py::dtype::of<T>())), array);
  if (array.ndim() != 1 || array.shape(0) != size || (size > 1 && array.strides(0) != array.itemsize()))
    throw py::value_error(std::string(name) + " must be contiguous of shape (" + std::to_string(size) + ",), got " +
                          shape_of(array));
  if (writeable && !array.writeable()) throw py::value_error(std::string(name) + " must be writeable");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// A C-contiguous float64 matrix of this shape.
double* matrix_of(const py::array& array, int64_t num_rows, int64_t num_columns, const char* name, bool writeable) {
  if (!py::isinstance<py::array_t<double>>(array)) wrong_dtype(name, "float64", array);
  if (array.ndim() != 2 || array.shape(0) != num_rows || array.shape(1) != num_columns ||
      !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " must be contiguous of shape (" + std::to_string(num_rows) + ", " +
                          std::to_string(num_columns) + "), got " + shape_of(array));
  if (writeable && !array.writeable()) throw py::value_error(std::string(name) + " must be writeable");
  return static_cast<double*>(const_cast<void*>(array.data()));
}

uint64_t* keys_of(const py::object& keys, int64_t num_rows) {
  if (keys.is_none()) return nullptr;
  if (!py::isinstance<py::array>(keys)) throw py::type_error("keys must be an array of uint64 or None");
  return vector_of<uint64_t>(py::reinterpret_borrow<py::array>(keys), num_rows, "keys", true);
}

RowMap make_map(double scale, const py::array& shift, const py::array& correction) {
  if (!std::isfinite(scale)) throw py::value_error("scale must be finite, got " + std::to_string(scale));
  if (shift.ndim() != 1) throw py::value_error("shift must have shape (dim,), got " + shape_of(shift));
  const int64_t dim = shift.shape(0);
  const double* shift_data = vector_of<double>(shift, dim, "shift", false);
  return RowMap(scale, shift_data, vector_of<double>(correction, dim, "correction", false), dim);
}

void check_dim(const RowMap& map, const py::array& array) {
  if (map.dim() != array.shape(1))
    throw py::value_error("rows must have the dimension of row_map, " + std::to_string(map.dim()) + ", got shape " +
                          shape_of(array));
}

int threads_of(int num_threads) {
  if (num_threads < 1) throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
  return num_threads;
}

py::tuple tuple_of(const BadRows& bad) { return py::make_tuple(bad.num_zero, bad.num_nonfinite, bad.first); }

py::tuple py_moments(const py::array& array, bool bfloat16, const py::array& sums, const py::object& keys,
                     int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  int64_t* sum = vector_of<int64_t>(sums, rows.range.dim, "sums", true);
  uint64_t* key = keys_of(keys, rows.range.num_rows);
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = moments(rows, sum, key, nullptr, threads);
  }
  return tuple_of(bad);
}

py::tuple py_covariance(const py::array& array, bool bfloat16, const py::array& pilot, const py::array& sums,
                        const py::object& keys, const py::array& products, int64_t num_seen, bool fast,
                        int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  const int64_t dim = rows.range.dim;
  const double* from = vector_of<double>(pilot, dim, "pilot", false);
  int64_t* sum = vector_of<int64_t>(sums, dim, "sums", true);
  uint64_t* key = keys_of(keys, rows.range.num_rows);
  double* product = matrix_of(products, dim, dim, "products", true);
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = covariance(rows, from, sum, key, product, num_seen, fast ? fast_kernels() : nullptr, threads);
  }
  return tuple_of(bad);
}

py::tuple py_transformed_moments(const py::array& array, bool bfloat16, const RowMap& map, const py::array& sums,
                                 int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  check_dim(map, array);
  int64_t* sum = vector_of<int64_t>(sums, rows.range.dim + kNumFactors, "sums", true);
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = transformed_moments(rows, map, sum, threads);
  }
  return tuple_of(bad);
}

void py_add_up(const RowMap& map, const py::array& mapped, const py::array& sums) {
  map.add_up(vector_of<int64_t>(mapped, map.dim() + kNumFactors, "mapped", false),
             vector_of<int64_t>(sums, map.dim(), "sums", true));
}

// The bytes from the first to past the last that rows lie in.
std::pair<const char*, const char*> extent_of(const Rows& rows) {
  const RowRange& range = rows.range;
  if (range.num_rows == 0) return {range.data, range.data};
  const char* last = range.data + (range.num_rows - 1) * range.stride;
  return {std::min(range.data, last), std::max(range.data, last) + range.dim * kItemsize[rows.dtype]};
}

bool overlap(const Rows& a, const Rows& b) {
  const auto [a_begin, a_end] = extent_of(a);
  const auto [b_begin, b_end] = extent_of(b);
  return a_begin < b_end && b_begin < a_end;
}

void check_shape(const py::array& array, const char* name, const py::array& rows) {
  if (array.shape(0) != rows.shape(0) || array.shape(1) != rows.shape(1))
    throw py::value_error(std::string(name) + " must have the shape of rows, " + shape_of(rows) + ", got " +
                          shape_of(array));
}

// `out_array` as rows of that dimension to write to, given those that are read.
Rows out_rows_of(const py::array& out_array, bool out_bfloat16, const Rows& rows, int64_t dim) {
  const Rows out = rows_of(out_array, out_bfloat16, "out");
  if (!out_array.writeable()) throw py::value_error("out must be writeable");
  if (out.range.num_rows != rows.range.num_rows || out.range.dim != dim)
    throw py::value_error("out must have shape (" + std::to_string(rows.range.num_rows) + ", " + std::to_string(dim) +
                          "), got " + shape_of(out_array));
  if (out.range.num_rows > 1 && std::abs(out.range.stride) < out.range.dim * kItemsize[out.dtype])
    throw py::value_error("out must not have rows that overlap");
  const bool in_place = out.range.data == rows.range.data && out.range.stride == rows.range.stride &&
                        out.range.dim == rows.range.dim && kItemsize[out.dtype] == kItemsize[rows.dtype];
  if (!in_place && overlap(rows, out)) throw py::value_error("out must be rows themselves or not overlap them");
  return out;
}

py::tuple transform_into(const py::array& array, bool bfloat16, const py::array& out_array, bool out_bfloat16,
                         const std::vector<const RowMap*>& maps, const int64_t* domain, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  const Rows out = out_rows_of(out_array, out_bfloat16, rows, rows.range.dim);
  for (const RowMap* map : maps) check_dim(*map, array);
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = row_transform(rows, maps, domain, const_cast<char*>(out.range.data), out.range.stride, out.dtype, threads);
  }
  return tuple_of(bad);
}

py::tuple py_row_transform(const py::array& array, bool bfloat16, const py::array& out, bool out_bfloat16,
                           const RowMap& map, int num_threads) {
  return transform_into(array, bfloat16, out, out_bfloat16, {&map}, nullptr, num_threads);
}

py::tuple py_row_transform_by_domain(const py::array& array, bool bfloat16, const py::array& out, bool out_bfloat16,
                                     const std::vector<const RowMap*>& maps, const py::array& domain_array,
                                     int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  const int64_t* domain = vector_of<int64_t>(domain_array, rows.range.num_rows, "domain", false);
  for (int64_t i = 0; i < rows.range.num_rows; ++i)
    if (domain[i] < 0 || domain[i] >= int64_t(maps.size()))
      throw py::value_error("domain must lie in [0, " + std::to_string(maps.size()) + "), got " +
                            std::to_string(domain[i]) + " for row " + std::to_string(i));
  return transform_into(array, bfloat16, out, out_bfloat16, maps, domain, num_threads);
}

AffineMap make_affine(const py::array& matrix, const py::array& centre, const py::array& offset) {
  if (matrix.ndim() != 2 || matrix.shape(0) < 1 || matrix.shape(0) > matrix.shape(1))
    throw py::value_error("matrix must have shape (out_dim, dim) with out_dim from 1 to dim, got " + shape_of(matrix));
  const int64_t out_dim = matrix.shape(0), dim = matrix.shape(1);
  const double* elements = matrix_of(matrix, out_dim, dim, "matrix", false);
  const double* from = vector_of<double>(centre, dim, "centre", false);
  return AffineMap(elements, from, vector_of<double>(offset, out_dim, "offset", false), out_dim, dim);
}

void check_dim(const AffineMap& affine, const py::array& array) {
  if (affine.dim() != array.shape(1))
    throw py::value_error("rows must have the dimension of affine, " + std::to_string(affine.dim()) + ", got shape " +
                          shape_of(array));
}

void check_dims(const AffineMap& affine, const RowMap& map) {
  if (map.dim() != affine.out_dim())
    throw py::value_error("row_map must have the dimension that affine gives, " + std::to_string(affine.out_dim()) +
                          ", got " + std::to_string(map.dim()));
}

py::tuple py_staged_transform(const py::array& array, bool bfloat16, const py::array& out_array, bool out_bfloat16,
                              const AffineMap* affine, const RowMap* map, double noise_std, uint64_t seed,
                              const py::object& index, int64_t first_index, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  if (affine) check_dim(*affine, array);
  if (affine && map) check_dims(*affine, *map);
  if (!affine && !map) throw py::value_error("affine and row_map must not both be None");
  if (!affine) check_dim(*map, array);
  const Rows out = out_rows_of(out_array, out_bfloat16, rows, affine ? affine->out_dim() : rows.range.dim);
  if (!(noise_std >= 0 && std::isfinite(noise_std)))
    throw py::value_error("noise_std must be finite and at least 0, got " + std::to_string(noise_std));
  const int64_t* numbers = nullptr;
  if (!index.is_none()) {
    if (!py::isinstance<py::array>(index)) throw py::type_error("index must be an array of int64 or None");
    numbers = vector_of<int64_t>(py::reinterpret_borrow<py::array>(index), rows.range.num_rows, "index", false);
  }
  const Noise noise{noise_std, seed, numbers, first_index};
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = staged_transform(rows, {affine, map, noise_std > 0 ? &noise : nullptr}, const_cast<char*>(out.range.data),
                           out.range.stride, out.dtype, threads);
  }
  return tuple_of(bad);
}

py::tuple py_affine_moments(const py::array& array, bool bfloat16, const AffineMap& affine, const RowMap& map,
                            const py::array& sums, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  check_dim(affine, array);
  check_dims(affine, map);
  int64_t* sum = vector_of<int64_t>(sums, affine.out_dim() + kNumFactors, "sums", true);
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = affine_moments(rows, affine, map, sum, threads);
  }
  return tuple_of(bad);
}

py::tuple py_take_rows(const py::array& array, bool bfloat16, const py::array& numbers, const py::array& out_array,
                       const RowMap* map, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows"), out = rows_of(out_array, bfloat16, "out");
  if (map) check_dim(*map, array);
  if (!out_array.writeable()) throw py::value_error("out must be writeable");
  if (out.dtype != rows.dtype || out.range.dim != rows.range.dim || !(out_array.flags() & py::array::c_style))
    throw py::value_error("out must be contiguous and of the dtype and dimension of rows");
  if (overlap(rows, out)) throw py::value_error("out must not overlap rows");
  const int64_t* const number = vector_of<int64_t>(numbers, out.range.num_rows, "numbers", false);
  for (int64_t i = 0; i < out.range.num_rows; ++i)
    if (number[i] < 0 || number[i] >= rows.range.num_rows)
      throw py::index_error("row " + std::to_string(number[i]) + " of " + std::to_string(rows.range.num_rows) +
                            " rows");
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = take_rows(rows, number, out, map, threads);
  }
  return tuple_of(bad);
}

void py_row_transform_backward(const py::array& array, bool bfloat16, const py::array& grad_array, bool grad_bfloat16,
                               const py::array& out_array, const RowMap& map, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  const Rows grad = rows_of(grad_array, grad_bfloat16, "grad");
  const Rows out = rows_of(out_array, bfloat16, "out");
  check_dim(map, array);
  check_shape(grad_array, "grad", array);
  check_shape(out_array, "out", array);
  if (out.dtype != rows.dtype || !out_array.writeable() || !(out_array.flags() & py::array::c_style))
    throw py::value_error("out must be writeable, contiguous and of the dtype of rows");
  if (overlap(rows, out) || overlap(grad, out)) throw py::value_error("out must overlap neither rows nor grad");
  const int threads = threads_of(num_threads);
  py::gil_scoped_release release;
  row_transform_backward(rows, grad, map, const_cast<char*>(out.range.data), out.range.stride, threads);
}

py::tuple py_find_bad_rows(const py::array& array, bool bfloat16, int num_threads) {
  const Rows rows = rows_of(array, bfloat16, "rows");
  BadRows bad;
  {
    const int threads = threads_of(num_threads);
    py::gil_scoped_release release;
    bad = find_bad_rows(rows, threads);
  }
  return tuple_of(bad);
}

// The bytes of a buffer, held while this lives.
class Bytes {
 public:
  Bytes(const py::object& object, const char* name, bool writeable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writeable ? PyBUF_CONTIG : PyBUF_CONTIG_RO) != 0) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must be a contiguous " + (writeable ? "writeable " : "") + "buffer");
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  char* data() const { return static_cast<char*>(view_.buf); }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_;
};

uint64_t py_stream_read(const py::object& buffer, int num_threads) {
  const Bytes bytes(buffer, "buffer", false);
  const int parts = useful_threads(threads_of(num_threads), bytes.size(), bytes.size());
  std::vector<uint64_t> sums(size_t(parts), 0);
  py::gil_scoped_release release;
  parallel_for(parts, bytes.size(), 1, 64, [&](int part, int64_t begin, int64_t end) {
    sums[size_t(part)] += current_table().stream_read(bytes.data() + begin, end - begin);
  });
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

void py_stream_copy(const py::object& source, const py::object& target, bool nontemporal, int num_threads) {
  const Bytes from(source, "source", false), to(target, "target", true);
  if (from.size() != to.size())
    throw py::value_error("target must have the " + std::to_string(from.size()) + " bytes of source, got " +
                          std::to_string(to.size()));
  const int parts = useful_threads(threads_of(num_threads), from.size(), from.size());
  py::gil_scoped_release release;
  parallel_for(parts, from.size(), 1, 64, [&](int, int64_t begin, int64_t end) {
    current_table().stream_copy(from.data() + begin, to.data() + begin, end - begin, nontemporal);
  });
}

// Calls read() without the interpreter's lock; what the system refuses becomes an OSError.
template <typename Read>
auto reading(const Read& read) {
  try {
    py::gil_scoped_release release;
    return read();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

int64_t py_read_file(int fd, const py::object& buffer, int64_t offset, int num_threads) {
  const Bytes bytes(buffer, "buffer", true);
  const int threads = threads_of(num_threads);
  return reading([&] { return read_file(fd, bytes.data(), bytes.size(), offset, threads); });
}

int64_t py_read_rows(const py::array& fds, const py::array& offsets, const py::object& buffer, int64_t row_bytes,
                     int num_threads) {
  const int64_t num_rows = fds.size();
  const int32_t* fd = vector_of<int32_t>(fds, num_rows, "fds", false);
  const int64_t* offset = vector_of<int64_t>(offsets, num_rows, "offsets", false);
  const Bytes bytes(buffer, "buffer", true);
  if (row_bytes < 1 || bytes.size() / row_bytes != num_rows || bytes.size() % row_bytes != 0)
    throw py::value_error("buffer must hold " + std::to_string(num_rows) + " rows of " + std::to_string(row_bytes) +
                          " bytes, got " + std::to_string(bytes.size()) + " bytes");
  const int threads = threads_of(num_threads);
  return reading([&] { return read_rows(fd, offset, num_rows, row_bytes, bytes.data(), threads); });
}

py::tuple read_transform_into(const FileRows& files, const py::array& out_array, bool bfloat16, const RowMap& map,
                              int num_threads) {
  const Rows out = rows_of(out_array, bfloat16, "out");
  if (!out_array.writeable()) throw py::value_error("out must be writeable");
  if (out.range.stride != out.range.dim * kItemsize[out.dtype]) throw py::value_error("out must be contiguous");
  check_dim(map, out_array);
  const int threads = threads_of(num_threads);
  int64_t num_read = 0;
  const BadRows bad = reading([&] { return read_transform(files, out, map, threads, &num_read); });
  return py::make_tuple(num_read, bad.num_zero, bad.num_nonfinite, bad.first);
}

py::tuple py_read_file_transform(int fd, int64_t offset, const py::array& out, bool bfloat16, const RowMap& map,
                                 int num_threads) {
  return read_transform_into({nullptr, nullptr, fd, offset}, out, bfloat16, map, num_threads);
}

py::tuple py_read_rows_transform(const py::array& fds, const py::array& offsets, const py::array& out, bool bfloat16,
                                 const RowMap& map, int num_threads) {
  const int64_t num_rows = rows_of(out, bfloat16, "out").range.num_rows;
  const int32_t* fd = vector_of<int32_t>(fds, num_rows, "fds", false);
  const int64_t* offset = vector_of<int64_t>(offsets, num_rows, "offsets", false);
  return read_transform_into({fd, offset, -1, 0}, out, bfloat16, map, num_threads);
}

Ids ids_of(const py::array& offsets, const Bytes& text) {
  if (offsets.size() < 1) throw py::value_error("offsets must have at least one element");
  const int64_t count = offsets.size() - 1;
  return {vector_of<int64_t>(offsets, count + 1, "offsets", false), text.data(), count, text.size()};
}

void py_hash_ids(const py::array& offsets, const py::object& text, const py::array& hashes) {
  const Bytes bytes(text, "text", false);
  const Ids ids = ids_of(offsets, bytes);
  uint64_t* hash = vector_of<uint64_t>(hashes, ids.count, "hashes", true);
  py::gil_scoped_release release;
  for (int64_t row = 0; row < ids.count; ++row) hash[row] = hash_of(ids.at(row));
}

int64_t py_find_ids(const py::sequence& wanted, const py::array& hashes, const py::array& rows,
                    const py::array& offsets, const py::object& text, const py::array& found) {
  const Bytes bytes(text, "text", false);
  const Ids ids = ids_of(offsets, bytes);
  const uint64_t* hash = vector_of<uint64_t>(hashes, ids.count, "hashes", false);
  const int64_t* row = vector_of<int64_t>(rows, ids.count, "rows", false);
  const int64_t count = int64_t(wanted.size());
  int64_t* to = vector_of<int64_t>(found, count, "found", true);
  int64_t missing = -1;
  for (int64_t i = 0; i < count; ++i) {
    const py::object item = wanted[size_t(i)];
    Py_ssize_t size = 0;
    const char* id = PyUnicode_Check(item.ptr()) ? PyUnicode_AsUTF8AndSize(item.ptr(), &size) : nullptr;
    PyErr_Clear();
    if (id == nullptr) throw py::type_error("ids must be text, got " + std::string(py::repr(item)));
    to[i] = find_id(ids, hash, row, {id, size_t(size)});
    if (to[i] < 0 && missing < 0) missing = i;
  }
  return missing;
}

}  // namespace
}  // namespace realign

PYBIND11_MODULE(_C, m) {
  using namespace realign;

  m.attr("FIXED_POINT_BITS") = kFixedPointBits;
  m.attr("NUM_FACTORS") = kNumFactors;
  py::class_<RowMap>(m, "RowMap", py::module_local())
      .def(py::init(&make_map), py::arg("scale"), py::arg("shift").noconvert(), py::arg("correction").noconvert())
      .def_property_readonly("dim", &RowMap::dim)
      .def("add_up", &py_add_up, py::arg("mapped"), py::arg("sums"));
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(current_table().name); });
  m.def("has_fast_products", [] { return fast_kernels() != nullptr; });
  m.def("use_instruction_set", &use_table, py::arg("name"));
  m.def("moments", &py_moments, py::arg("rows").noconvert(), py::arg("bfloat16"), py::arg("sums").noconvert(),
        py::arg("keys").none(true), py::arg("num_threads"));
  m.def("covariance", &py_covariance, py::arg("rows").noconvert(), py::arg("bfloat16"), py::arg("pilot").noconvert(),
        py::arg("sums").noconvert(), py::arg("keys").none(true), py::arg("products").noconvert(), py::arg("num_seen"),
        py::arg("fast"), py::arg("num_threads"));
  m.def("transformed_moments", &py_transformed_moments, py::arg("rows").noconvert(), py::arg("bfloat16"),
        py::arg("row_map"), py::arg("sums").noconvert(), py::arg("num_threads"));
  m.def("row_transform", &py_row_transform, py::arg("rows").noconvert(), py::arg("bfloat16"),
        py::arg("out").noconvert(), py::arg("out_bfloat16"), py::arg("row_map"), py::arg("num_threads"));
  m.def("row_transform_by_domain", &py_row_transform_by_domain, py::arg("rows").noconvert(), py::arg("bfloat16"),
        py::arg("out").noconvert(), py::arg("out_bfloat16"), py::arg("row_maps"), py::arg("domain").noconvert(),
        py::arg("num_threads"));
  py::class_<AffineMap>(m, "AffineMap", py::module_local())
      .def(py::init(&make_affine), py::arg("matrix").noconvert(), py::arg("centre").noconvert(),
           py::arg("offset").noconvert())
      .def_property_readonly("dim", &AffineMap::dim)
      .def_property_readonly("out_dim", &AffineMap::out_dim);
  m.def("staged_transform", &py_staged_transform, py::arg("rows").noconvert(), py::arg("bfloat16"),
        py::arg("out").noconvert(), py::arg("out_bfloat16"), py::arg("affine").none(true),
        py::arg("row_map").none(true), py::arg("noise_std"), py::arg("seed"), py::arg("index").none(true),
        py::arg("first_index"), py::arg("num_threads"));
  m.def("affine_moments", &py_affine_moments, py::arg("rows").noconvert(), py::arg("bfloat16"), py::arg("affine"),
        py::arg("row_map"), py::arg("sums").noconvert(), py::arg("num_threads"));
  m.def("take_rows", &py_take_rows, py::arg("rows").noconvert(), py::arg("bfloat16"), py::arg("numbers").noconvert(),
        py::arg("out").noconvert(), py::arg("row_map").none(true), py::arg("num_threads"));
  m.def("row_transform_backward", &py_row_transform_backward, py::arg("rows").noconvert(), py::arg("bfloat16"),
        py::arg("grad").noconvert(), py::arg("grad_bfloat16"), py::arg("out").noconvert(), py::arg("row_map"),
        py::arg("num_threads"));
  m.def("find_bad_rows", &py_find_bad_rows, py::arg("rows").noconvert(), py::arg("bfloat16"), py::arg("num_threads"));
  m.def("stream_read", &py_stream_read, py::arg("buffer"), py::arg("num_threads"));
  m.def("stream_copy", &py_stream_copy, py::arg("source"), py::arg("target"), py::arg("nontemporal"),
        py::arg("num_threads"));
  m.def("read_file", &py_read_file, py::arg("fd"), py::arg("buffer"), py::arg("offset"), py::arg("num_threads"));
  m.def("read_rows", &py_read_rows, py::arg("fds"), py::arg("offsets"), py::arg("buffer"), py::arg("row_bytes"),
        py::arg("num_threads"));
  m.def("read_file_transform", &py_read_file_transform, py::arg("fd"), py::arg("offset"), py::arg("out").noconvert(),
        py::arg("bfloat16"), py::arg("row_map"), py::arg("num_threads"));
  m.def("read_rows_transform", &py_read_rows_transform, py::arg("fds"), py::arg("offsets"), py::arg("out").noconvert(),
        py::arg("bfloat16"), py::arg("row_map"), py::arg("num_threads"));
  m.def("hash_ids", &py_hash_ids, py::arg("offsets"), py::arg("text"), py::arg("hashes"));
  m.def("find_ids", &py_find_ids, py::arg("ids"), py::arg("hashes"), py::arg("rows"), py::arg("offsets"),
        py::arg("text"), py::arg("found"));
  py::class_<FileMap>(m, "FileMap", py::module_local(), py::buffer_protocol())
      .def(py::init([](int fd, int64_t offset, int64_t size) {
             if (offset < 0 || size < 1) throw py::value_error("a map begins at 0 or later and has at least 1 byte");
             return reading([&] { return std::make_unique<FileMap>(fd, offset, size); });
           }),
           py::arg("fd"), py::arg("offset"), py::arg("size"))
      .def_property_readonly("broken", &FileMap::broken)
      .def_buffer([](const FileMap& map) {
        return py::buffer_info(const_cast<char*>(map.data()), 1, "B", 1, {map.size()}, {int64_t(1)}, true);
      });
  py::class_<Xxh64>(m, "XXH64", py::module_local())
      .def(py::init<uint64_t>(), py::arg("seed") = 0)
      .def(
          "update",
          [](Xxh64& hash, const py::object& data) {
            const Bytes bytes(data, "data", false);
            py::gil_scoped_release release;
            hash.update(reinterpret_cast<const unsigned char*>(bytes.data()), uint64_t(bytes.size()));
          },
          py::arg("data"))
      .def("intdigest", &Xxh64::digest)
      .def("hexdigest", [](const Xxh64& hash) {
        char text[17];
        std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash.digest()));
        return std::string(text);
      });
  m.def(
      "scan_pickle",
      [](const py::object& data) {
        const Bytes bytes(data, "data", false);
        py::gil_scoped_release release;
        scan_pickle(reinterpret_cast<const std::uint8_t*>(bytes.data()), size_t(bytes.size()));
      },
      py::arg("data"));
}
