// What the halves are given and return, for the common case that nothing is wrong with it: a few hundred
// nanoseconds instead of the microseconds that checks in Python take, and those several times over when other
// work has emptied the caches. The package looks closer at whatever is not taken here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "bindings/common.h"
#include "bindings/tensor_exchange.h"
#include "protocol/limits.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace efa_ep::bindings {
namespace {

constexpr nb::dlpack::dtype kInt32 = nb::dtype<int32_t>();
constexpr nb::dlpack::dtype kInt64 = nb::dtype<int64_t>();
constexpr nb::dlpack::dtype kFloat32 = nb::dtype<float>();

/// Knows the dtype and device that tensors must have: those of a sample.
class TensorGlance {
 public:
  TensorGlance(nb::handle exchange, nb::handle sample)
      : exchange_(exchange), sample_(exchange_.look(sample).value_or(DlTensor{})) {}

  /// The address of a contiguous tensor of that shape, at a multiple of 16; 0 to be looked at closely.
  uintptr_t address(nb::handle object, const std::vector<int64_t>& shape) const {
    const std::optional<DlTensor> tensor = exchange_.look(object);
    if (!tensor || !same_format(*tensor, sample_) || !contiguous(*tensor)) return 0;
    if (!std::ranges::equal(shape, std::span(tensor->shape, static_cast<size_t>(tensor->ndim)))) return 0;
    const uintptr_t address = address_of(*tensor);
    return address % kRowAlignment == 0 ? address : 0;
  }

 private:
  TensorExchange exchange_;
  DlTensor sample_;  // its shape and strides may be gone
};

/// Knows what dispatch_send of a channel takes.
class DispatchGlance {
 public:
  using Arguments =
      nb::typed<nb::tuple, uintptr_t, size_t, uintptr_t, uintptr_t, bool, uintptr_t, int64_t, uintptr_t>;

  /// `x` is a sample of the tokens: dtype, device, columns. With `in_place`, it is all rows of activations(),
  /// which may stay where they are.
  DispatchGlance(nb::handle exchange, nb::handle x, bool in_place, int64_t top_k, int64_t scale_columns)
      : exchange_(exchange), top_k_(top_k), scale_columns_(scale_columns) {
    const std::optional<DlTensor> sample = exchange_.look(x);
    if (!sample) return;
    x_ = *sample;
    columns_ = x_.shape[1];
    if (!in_place) return;
    first_ = address_of(x_);
    stride_ = x_.strides[0];
    end_ = first_ + row_bytes(stride_) * static_cast<size_t>(x_.shape[0]);
  }

  /// The arguments of the halves' dispatch_send after the channel; nothing to look closely.
  std::optional<Arguments> read(nb::handle x, nb::handle ids, nb::handle weights, nb::handle scales,
                                nb::handle count) const {
    const std::optional<DlTensor> tokens = exchange_.look(x);
    if (!tokens || !same_format(*tokens, x_) || tokens->ndim != 2 || tokens->shape[1] != columns_) {
      return std::nullopt;
    }
    const int64_t rows = tokens->shape[0];
    const uintptr_t address = address_of(*tokens);
    int64_t stride = columns_;
    if (address == first_ && (rows == 1 || tokens->strides[0] == stride_) && tokens->strides[1] == 1) {
      stride = stride_;
    } else if ((first_ <= address && address < end_) || address % kRowAlignment != 0 ||
               !contiguous(*tokens)) {
      return std::nullopt;
    }
    const uintptr_t short_ids = table(ids, kInt32, rows, top_k_);
    const uintptr_t long_ids = short_ids == 0 ? table(ids, kInt64, rows, top_k_) : 0;
    const uintptr_t weight = table(weights, kFloat32, rows, top_k_);
    const uintptr_t scale = scales.is_none() ? 0 : table(scales, kFloat32, rows, scale_columns_);
    const uintptr_t counted = count.is_none() ? 0 : table(count, kInt32, 1, 0);
    if (address == 0 || short_ids + long_ids == 0 || weight == 0) return std::nullopt;
    if (scales.is_none() != (scale_columns_ == 0) || (scale == 0) != scales.is_none()) return std::nullopt;
    if ((counted == 0) != count.is_none()) return std::nullopt;
    return Arguments(nb::make_tuple(address, row_bytes(stride), scale, short_ids + long_ids, long_ids != 0,
                                    weight, rows, counted));
  }

 private:
  size_t row_bytes(int64_t elements) const { return static_cast<size_t>(elements) * x_.dtype.bits / 8; }

  /// The address of a contiguous table [rows, columns], or [rows] with no columns, beside the tokens; else 0.
  uintptr_t table(nb::handle object, nb::dlpack::dtype dtype, int64_t rows, int64_t columns) const {
    const std::optional<DlTensor> tensor = exchange_.look(object);
    DlTensor wanted = x_;
    wanted.dtype = dtype;
    if (!tensor || !same_format(*tensor, wanted) || tensor->ndim != (columns == 0 ? 1 : 2)) return 0;
    if (tensor->shape[0] != rows || (columns != 0 && tensor->shape[1] != columns)) return 0;
    return contiguous(*tensor) ? address_of(*tensor) : 0;
  }

  TensorExchange exchange_;
  DlTensor x_;  // its shape and strides may be gone
  int64_t columns_ = 0, top_k_, scale_columns_;
  uintptr_t first_ = 0, end_ = 0;
  int64_t stride_ = 0;
};

/// Makes views of the first rows of some tables.
class RowViews {
 public:
  using Tables = std::vector<nb::object>;

  RowViews(nb::handle exchange, Tables tables) : exchange_(exchange), tables_(std::move(tables)) {
    if (!exchange_.available()) return;
    for (const nb::object& table : tables_) {
      shares_.emplace_back(exchange_.share(table), [](ManagedTensor* share) { share->deleter(share); });
    }
  }

  /// A tuple of tables [rows, columns], contiguous like those they are of, which they keep alive.
  nb::typed<nb::tuple, nb::any, nb::ellipsis> first(int64_t rows) const {
    nb::list views;
    for (size_t i = 0; i < tables_.size(); ++i) {
      if (!exchange_.available()) {
        views.append(tables_[i][nb::slice(nb::none(), nb::int_(rows), nb::none())]);
        continue;
      }
      auto view = std::make_unique<View>(shares_[i], rows);
      const nb::object tensor = exchange_.adopt(&view->managed);
      [[maybe_unused]] const View* adopted = view.release();
      views.append(tensor);
    }
    return nb::tuple(views);
  }

 private:
  using Share = std::shared_ptr<ManagedTensor>;
  struct View {
    View(Share table, int64_t rows) : share(std::move(table)) {
      const DlTensor& whole = share->tensor;
      shape = {rows, whole.shape[1]};
      strides = {whole.shape[1], 1};
      managed.version = share->version;
      managed.context = this;
      managed.deleter = [](ManagedTensor* self) { delete static_cast<View*>(self->context); };
      managed.tensor = whole;
      managed.tensor.shape = shape.data();
      managed.tensor.strides = strides.data();
    }
    Share share;
    std::array<int64_t, 2> shape, strides;
    ManagedTensor managed;
  };

  TensorExchange exchange_;
  Tables tables_;
  std::vector<Share> shares_;
};

}  // namespace

TensorExchange::TensorExchange(nb::handle capsule) {
  if (capsule.is_none()) return;
  const auto* functions =
      static_cast<const Functions*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (functions == nullptr) nb::raise_python_error();
  if (functions->version.major == ManagedTensor::Version{}.major) functions_ = functions;
}

std::optional<DlTensor> TensorExchange::look(nb::handle object) const {
  if (!available()) return std::nullopt;
  std::optional<DlTensor> tensor(std::in_place);
  if (functions_->look(object.ptr(), &*tensor) == 0 && (tensor->ndim == 0 || tensor->strides != nullptr)) {
    return tensor;
  }
  PyErr_Clear();
  return std::nullopt;
}

ManagedTensor* TensorExchange::share(nb::handle tensor) const {
  ManagedTensor* shared = nullptr;
  if (functions_->share(tensor.ptr(), &shared) != 0) nb::raise_python_error();
  return shared;
}

nb::object TensorExchange::adopt(ManagedTensor* tensor) const {
  void* object = nullptr;
  if (functions_->adopt(tensor, &object) != 0) nb::raise_python_error();
  return nb::steal(static_cast<PyObject*>(object));
}

void bind_tensors(nb::module_& m) {
  m.attr("ROW_ALIGNMENT") = kRowAlignment;
  nb::class_<TensorGlance>(m, "TensorGlance")
      .def(nb::init<nb::handle, nb::handle>(), "exchange"_a.none(), "sample"_a)
      .def("address", &TensorGlance::address, "tensor"_a.none(), "shape"_a,
           "Of a contiguous tensor of that shape with the sample's dtype and device, at a multiple of 16; "
           "else 0.");
  nb::class_<DispatchGlance>(m, "DispatchGlance")
      .def(nb::init<nb::handle, nb::handle, bool, int64_t, int64_t>(), nb::kw_only(), "exchange"_a.none(),
           "x"_a, "in_place"_a, "top_k"_a, "scale_columns"_a)
      .def("read", &DispatchGlance::read, "x"_a.none(), "topk_ids"_a.none(), "topk_weights"_a.none(),
           "scales"_a.none(), "count"_a.none(),
           "The arguments of dispatch_send after the channel, if it can take the tensors as they are; else "
           "None.");
  nb::class_<RowViews>(m, "RowViews")
      .def(nb::init<nb::handle, RowViews::Tables>(), "exchange"_a.none(), "tables"_a)
      .def("first", &RowViews::first, "rows"_a, "Views of the first rows of every table.");
}

}  // namespace efa_ep::bindings
