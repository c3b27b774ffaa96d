// The rules that efaemu imposes, checked with plain libfabric calls: what the transport's own tests rely on.
#include <gtest/gtest.h>
#include <rdma/fabric.h>
#include <rdma/fi_atomic.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <rdma/fi_tagged.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "fabric/libfabric_compat.h"
#include "fabric/libfabric_library.h"
#include "fabric/libfabric_provider.h"
#include "fabric/libfabric_rail.h"

namespace efa_ep {
namespace {

constexpr int kRegistrationMode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
constexpr size_t kDepth = 8;

/// What fi_getinfo answers to the hints of an application that knows EFA, changed by `change`.
InfoPtr ask(const std::function<void(fi_info&)>& change) {
  const char* path = std::getenv("EFA_EP_LIBFABRIC");
  const LibfabricLibrary& library = LibfabricLibrary::open(path != nullptr ? path : "");
  const InfoPtr hints(fi_allocinfo());
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->mr_mode = kRegistrationMode;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  hints->fabric_attr->prov_name = strdup("efaemu");
  change(*hints);
  fi_info* answer = nullptr;
  const int result = fi_getinfo(library.api_version(), nullptr, nullptr, 0, hints.get(), &answer);
  EXPECT_TRUE(result == 0 || result == -FI_ENODATA) << result;
  return InfoPtr(result == 0 ? answer : nullptr);
}

TEST(EfaemuInfo, AnswersLikeEfaDirect) {
  const InfoPtr info = ask([](fi_info&) {});
  ASSERT_TRUE(info) << "is FI_PROVIDER_PATH the directory of libefaemu-fi.so?";
  EXPECT_STREQ(info->fabric_attr->prov_name, "efaemu");
  EXPECT_STREQ(info->fabric_attr->name, "efaemu-direct");
  EXPECT_EQ(info->mode, FI_CONTEXT2);
  EXPECT_EQ(info->domain_attr->mr_mode, kRegistrationMode);
  EXPECT_EQ(info->domain_attr->cq_data_size, 4U);
  EXPECT_EQ(info->tx_attr->inject_size, 32U);
  EXPECT_EQ(info->tx_attr->rma_iov_limit, 1U);
  EXPECT_EQ(info->tx_attr->msg_order, 0U);
  EXPECT_TRUE(ask([](fi_info& hints) { hints.fabric_attr->name = strdup("efaemu-direct"); }));
}

TEST(EfaemuInfo, RefusesWhatEfaDirectRefuses) {
  EXPECT_FALSE(ask([](fi_info& hints) { hints.fabric_attr->name = strdup("efa"); }));
  EXPECT_FALSE(ask([](fi_info& hints) { hints.mode = 0; }));
  EXPECT_FALSE(ask([](fi_info& hints) { hints.domain_attr->cq_data_size = 8; }));
  EXPECT_FALSE(ask([](fi_info& hints) { hints.tx_attr->msg_order = FI_ORDER_SAS; }));
  for (const int bit : {FI_MR_LOCAL, FI_MR_VIRT_ADDR, FI_MR_ALLOCATED, FI_MR_PROV_KEY}) {
    EXPECT_FALSE(ask([bit](fi_info& hints) { hints.domain_attr->mr_mode &= ~bit; })) << bit;
  }
  for (const uint64_t capability : {FI_ATOMIC, FI_FENCE, FI_TAGGED, FI_RMA_EVENT}) {
    EXPECT_FALSE(ask([capability](fi_info& hints) { hints.caps |= capability; })) << capability;
  }
}

TEST(EfaemuInfo, OfferingRxCqDataTurnsUnsolicitedWritesOff) {
  const InfoPtr info = ask([](fi_info& hints) { hints.mode |= FI_RX_CQ_DATA; });
  ASSERT_TRUE(info);
  EXPECT_TRUE(info->mode & FI_RX_CQ_DATA);
  setenv("EFAEMU_UNSOLICITED", "0", 1);
  EXPECT_FALSE(ask([](fi_info&) {}));
  unsetenv("EFAEMU_UNSOLICITED");
}

/// An endpoint that writes to itself.
class EfaemuEndpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("EFAEMU_DEPTH", std::to_string(kDepth).c_str(), 1);
    info_ = ask([](fi_info&) {});
    ASSERT_TRUE(info_);
    open(fabric_, [&](fid_fabric** fabric) { return fi_fabric(info_->fabric_attr, fabric, nullptr); });
    open(domain_,
         [&](fid_domain** domain) { return fi_domain(fabric_.get(), info_.get(), domain, nullptr); });
    fi_av_attr vector_attributes{};
    vector_attributes.type = FI_AV_TABLE;
    open(vector_,
         [&](fid_av** vector) { return fi_av_open(domain_.get(), &vector_attributes, vector, nullptr); });
    fi_cq_attr queue_attributes{};
    queue_attributes.format = FI_CQ_FORMAT_DATA;
    open(queue_,
         [&](fid_cq** queue) { return fi_cq_open(domain_.get(), &queue_attributes, queue, nullptr); });
    fid_ep* endpoint = nullptr;
    ASSERT_EQ(fi_endpoint(domain_.get(), info_.get(), &endpoint, nullptr), 0);
    endpoint_.reset(endpoint);
    ASSERT_EQ(fi_ep_bind(endpoint_.get(), &vector_->fid, 0), 0);
    ASSERT_EQ(fi_ep_bind(endpoint_.get(), &queue_->fid, FI_TRANSMIT | FI_RECV), 0);
    ASSERT_EQ(fi_enable(endpoint_.get()), 0);
    region_ = register_memory(domain_.get());

    std::array<std::byte, 64> name{};
    size_t length = name.size();
    ASSERT_EQ(fi_getname(&endpoint_->fid, name.data(), &length), 0);
    ASSERT_EQ(fi_av_insert(vector_.get(), name.data(), 1, &self_, 0, nullptr), 1);

    source_ = {memory_.data(), 16};
    descriptor_ = fi_mr_desc(region_.get());
    destination_ = {reinterpret_cast<uintptr_t>(memory_.data() + 32), 16, fi_mr_key(region_.get())};
    message_.msg_iov = &source_;
    message_.desc = &descriptor_;
    message_.iov_count = 1;
    message_.addr = self_;
    message_.rma_iov = &destination_;
    message_.rma_iov_count = 1;
    message_.context = &contexts_[0];
    message_.data = 0xffffffff;
  }

  void TearDown() override { unsetenv("EFAEMU_DEPTH"); }

  template <typename Object>
  static void open(FidPtr<Object>& object, const std::type_identity_t<std::function<int(Object**)>>& call) {
    Object* opened = nullptr;
    ASSERT_EQ(call(&opened), 0);
    object.reset(opened);
  }

  FidPtr<fid_mr> register_memory(fid_domain* domain) {
    const iovec range{memory_.data(), memory_.size()};
    libfabric_compat::MrAttr padded;
    padded.attr.mr_iov = &range;
    padded.attr.iov_count = 1;
    padded.attr.access = FI_WRITE | FI_REMOTE_WRITE;
    FidPtr<fid_mr> region;
    open(region, [&](fid_mr** opened) { return fi_mr_regattr(domain, &padded.attr, 0, opened); });
    return region;
  }

  ssize_t write(uint64_t more_flags = 0) {
    return fi_writemsg(endpoint_.get(), &message_, FI_REMOTE_CQ_DATA | FI_COMPLETION | more_flags);
  }

  std::array<std::byte, 64> memory_{};
  std::array<fi_context2, kDepth + 1> contexts_{};
  InfoPtr info_;
  FidPtr<fid_fabric> fabric_;
  FidPtr<fid_domain> domain_;
  FidPtr<fid_av> vector_;
  FidPtr<fid_cq> queue_;
  FidPtr<fid_mr> region_;
  FidPtr<fid_ep> endpoint_;
  fi_addr_t self_ = FI_ADDR_UNSPEC;
  iovec source_{};
  void* descriptor_ = nullptr;
  fi_rma_iov destination_{};
  fi_msg_rma message_{};
};

TEST_F(EfaemuEndpoint, TakesExactlyItsDepth) {
  for (size_t i = 0; i < kDepth; ++i) {
    message_.context = &contexts_[i];
    EXPECT_EQ(write(), 0) << i;
  }
  message_.context = &contexts_[kDepth];
  EXPECT_EQ(write(), -FI_EAGAIN);
}

TEST_F(EfaemuEndpoint, RefusesAContextInFlight) {
  EXPECT_EQ(write(), 0);
  EXPECT_EQ(write(), -FI_EINVAL);
  message_.context = nullptr;
  EXPECT_EQ(write(), -FI_EINVAL);
}

TEST_F(EfaemuEndpoint, RefusesFencesInjectionAndWideImmediates) {
  EXPECT_EQ(write(FI_FENCE), -FI_EINVAL);
  EXPECT_EQ(write(FI_INJECT), -FI_EINVAL);
  message_.data = uint64_t{1} << 32;
  EXPECT_EQ(write(), -FI_EINVAL);
}

TEST_F(EfaemuEndpoint, RefusesMoreThanOneRange) {
  message_.iov_count = 2;
  EXPECT_EQ(write(), -FI_EINVAL);
  message_.iov_count = 1;
  message_.rma_iov_count = 2;
  EXPECT_EQ(write(), -FI_EINVAL);
}

TEST_F(EfaemuEndpoint, RefusesSourcesOutsideOfTheirRegistration) {
  descriptor_ = nullptr;
  EXPECT_EQ(write(), -FI_EINVAL);
  message_.desc = nullptr;
  EXPECT_EQ(write(), -FI_EINVAL);
  message_.desc = &descriptor_;
  descriptor_ = fi_mr_desc(region_.get());
  source_.iov_base = memory_.data() + 49;
  EXPECT_EQ(write(), -FI_EINVAL);
  source_.iov_base = memory_.data() - 1;
  EXPECT_EQ(write(), -FI_EINVAL);
  source_.iov_base = memory_.data() + 48;
  EXPECT_EQ(write(), 0);
}

TEST_F(EfaemuEndpoint, ForgetsClosedRegistrations) {
  region_.reset();
  EXPECT_EQ(write(), -FI_EINVAL);
}

TEST_F(EfaemuEndpoint, ChoosesKeysOf32BitsThatDifferBetweenDomains) {
  FidPtr<fid_domain> other;
  open(other, [&](fid_domain** domain) { return fi_domain(fabric_.get(), info_.get(), domain, nullptr); });
  const FidPtr<fid_mr> elsewhere = register_memory(other.get());
  const FidPtr<fid_mr> again = register_memory(domain_.get());
  EXPECT_LE(fi_mr_key(region_.get()), UINT32_MAX);
  EXPECT_NE(fi_mr_key(region_.get()), fi_mr_key(again.get()));
  EXPECT_NE(fi_mr_key(region_.get()), fi_mr_key(elsewhere.get()));
}

}  // namespace
}  // namespace efa_ep
