#include "pickle_scan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace realign {
namespace {

// Longer numbers than this are no data; CPython converts decimal ones in quadratic time.
constexpr std::size_t kMaxNumberBytes = 64;

enum Opcode : std::uint8_t {
  kMark = '(',
  kStop = '.',
  kFloat = 'F',
  kInt = 'I',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kLong = 'L',
  kBinInt2 = 'M',
  kNone = 'N',
  kReduce = 'R',
  kString = 'S',
  kBinString = 'T',
  kShortBinString = 'U',
  kUnicode = 'V',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kDict = 'd',
  kEmptyDict = '}',
  kAppends = 'e',
  kGet = 'g',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kList = 'l',
  kEmptyList = ']',
  kPut = 'p',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kEmptyTuple = ')',
  kSetItems = 'u',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kBinFloat = 'G',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kLong4 = 0x8b,
  kShortBinUnicode = 0x8c,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
  kByteArray8 = 0x96,
};

enum class Kind : std::uint8_t { kPlain, kString, kGlobal, kTuple, kList, kDict, kObject };

struct Node {
  Kind kind;
  std::uint8_t depth;  // levels of containers, itself included
  bool contained;      // it lies in another container and may not change any more
};

using NodeIndex = std::uint32_t;

// Values without depth that never change share one node a kind.
constexpr NodeIndex kPlainNode = 0;
constexpr NodeIndex kStringNode = 1;
constexpr NodeIndex kGlobalNode = 2;
constexpr NodeIndex kUnset = UINT32_MAX;

class Scanner {
 public:
  Scanner(const std::uint8_t* data, std::size_t size)
      : data_(data),
        size_(size),
        nodes_{{Kind::kPlain, 0, false}, {Kind::kString, 0, false}, {Kind::kGlobal, 0, false}} {}

  void run() {
    while (step()) {
    }
    if (position_ != size_) fail("bytes follow its end (more than one pickle in a file?)");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument("byte " + std::to_string(opcode_at_) + ": " + what);
  }

  std::size_t left() const { return size_ - position_; }

  void skip(std::uint64_t count) {
    if (count > left()) {
      fail("truncated: expected " + std::to_string(count) + " more bytes, found " + std::to_string(left()));
    }
    position_ += static_cast<std::size_t>(count);
  }

  std::uint64_t number(int num_bytes) {
    const std::uint8_t* from = data_ + position_;
    skip(num_bytes);
    std::uint64_t value = 0;
    for (int i = num_bytes - 1; i >= 0; --i) value = value << 8 | from[i];
    return value;
  }

  std::size_t line() {
    const void* end = left() ? std::memchr(data_ + position_, '\n', left()) : nullptr;
    if (end == nullptr) fail("truncated: a line does not end");
    const std::size_t length = static_cast<const std::uint8_t*>(end) - (data_ + position_);
    position_ += length + 1;
    return length;
  }

  std::uint64_t index_line() {
    const std::uint8_t* from = data_ + position_;
    const std::size_t length = line();
    if (length == 0 || length > 10) fail("a memo index is no number");
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < length; ++i) {
      if (from[i] < '0' || from[i] > '9') fail("a memo index is no number");
      value = value * 10 + (from[i] - '0');
    }
    return value;
  }

  void push(NodeIndex node) { stack_.push_back(node); }

  void push_skipping(NodeIndex node, std::uint64_t num_bytes) {
    skip(num_bytes);
    push(node);
  }

  void push_new(Kind kind, int depth) {
    check_depth(depth);
    if (nodes_.size() == kUnset) fail("too many containers");
    push(static_cast<NodeIndex>(nodes_.size()));
    nodes_.push_back({kind, static_cast<std::uint8_t>(depth), false});
  }

  void check_depth(int depth) const {
    if (depth > kMaxPickleDepth) fail("nested deeper than " + std::to_string(kMaxPickleDepth) + " levels");
  }

  // Where the `count` topmost values above the last mark begin.
  std::size_t last(std::size_t count) const {
    if (stack_.size() < (marks_.empty() ? 0 : marks_.back()) + count) fail("takes values where there are none");
    return stack_.size() - count;
  }

  NodeIndex top() const { return stack_[last(1)]; }

  NodeIndex pop() {
    const NodeIndex node = top();
    stack_.pop_back();
    return node;
  }

  std::size_t pop_mark() {
    if (marks_.empty()) fail("no mark to go back to");
    const std::size_t mark = marks_.back();
    marks_.pop_back();
    return mark;
  }

  // Takes the values from index `from` on, which become contents of a container; returns the depth of that container.
  int contain(std::size_t from) {
    int depth = 0;
    for (std::size_t i = from; i < stack_.size(); ++i) {
      Node& node = nodes_[stack_[i]];
      node.contained = true;
      depth = std::max<int>(depth, node.depth);
    }
    stack_.resize(from);
    return depth + 1;
  }

  // As `contain`, for keys and values in turn. A tuple of tuples that repeat is small, but hashing it as a key is not.
  int contain_items(std::size_t from) {
    for (std::size_t i = from; i < stack_.size(); i += 2) {
      const Kind kind = nodes_[stack_[i]].kind;
      if (kind != Kind::kPlain && kind != Kind::kString && kind != Kind::kObject) fail("a key that is a container");
    }
    return contain(from);
  }

  // The container on top of the stack receives contents that make it `depth` deep.
  void extend(Kind kind, int depth) {
    Node& node = nodes_[top()];
    if (node.kind != kind) fail("adds to a value of another kind");
    if (node.contained) fail("changes a container that another one holds");
    check_depth(depth);
    node.depth = std::max(node.depth, static_cast<std::uint8_t>(depth));
  }

  void put(std::uint64_t index) {
    // Picklers number memo entries in order, from 0 (Python 2: from 1).
    if (index > num_puts_ + 1) fail("memo index " + std::to_string(index) + " is out of order");
    if (index >= memo_.size()) memo_.resize(static_cast<std::size_t>(index) + 1, kUnset);
    if (memo_[index] == kUnset) ++num_puts_;
    memo_[index] = top();
  }

  void get(std::uint64_t index) {
    if (index >= memo_.size() || memo_[index] == kUnset) fail("memo entry " + std::to_string(index) + " is not set");
    push(memo_[index]);
  }

  bool step();

  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t position_ = 0;
  std::size_t opcode_at_ = 0;
  std::vector<Node> nodes_;
  std::vector<NodeIndex> stack_;
  std::vector<std::size_t> marks_;
  std::vector<NodeIndex> memo_;
  std::uint64_t num_puts_ = 0;
};

bool Scanner::step() {
  opcode_at_ = position_;
  if (left() == 0) fail("truncated: the pickle does not end");
  const std::uint8_t opcode = data_[position_++];
  switch (opcode) {
    case kStop:
      pop();
      if (!stack_.empty() || !marks_.empty()) fail("ends with values left over");
      return false;
    case kProto:
      if (number(1) > 5) fail("a protocol above 5");
      break;
    case kFrame:
      if (number(8) > left()) fail("a frame longer than the file");
      break;

    case kNone:
    case kNewTrue:
    case kNewFalse:
      push(kPlainNode);
      break;
    case kBinInt1:
      push_skipping(kPlainNode, 1);
      break;
    case kBinInt2:
      push_skipping(kPlainNode, 2);
      break;
    case kBinInt:
      push_skipping(kPlainNode, 4);
      break;
    case kBinFloat:
      push_skipping(kPlainNode, 8);
      break;
    case kInt:
    case kLong:
    case kFloat:
      if (line() > kMaxNumberBytes) fail("a number is too long");
      push(kPlainNode);
      break;
    case kLong1:
    case kLong4: {
      const std::uint64_t length = number(opcode == kLong1 ? 1 : 4);
      if (length > kMaxNumberBytes) fail("a number is too long");
      push_skipping(kPlainNode, length);
      break;
    }
    case kShortBinBytes:
      push_skipping(kPlainNode, number(1));
      break;
    case kBinBytes:
      push_skipping(kPlainNode, number(4));
      break;
    case kBinBytes8:
    case kByteArray8:
      push_skipping(kPlainNode, number(8));
      break;
    case kString:
    case kUnicode:
      line();
      push(kStringNode);
      break;
    case kShortBinString:
    case kShortBinUnicode:
      push_skipping(kStringNode, number(1));
      break;
    case kBinString:
    case kBinUnicode:
      push_skipping(kStringNode, number(4));
      break;
    case kBinUnicode8:
      push_skipping(kStringNode, number(8));
      break;

    case kMark:
      marks_.push_back(stack_.size());
      break;
    case kEmptyTuple:
      push_new(Kind::kTuple, 1);
      break;
    case kEmptyList:
      push_new(Kind::kList, 1);
      break;
    case kEmptyDict:
      push_new(Kind::kDict, 1);
      break;
    case kTuple1:
    case kTuple2:
    case kTuple3:
      push_new(Kind::kTuple, contain(last(opcode - kTuple1 + 1)));
      break;
    case kTuple:
      push_new(Kind::kTuple, contain(pop_mark()));
      break;
    case kList:
      push_new(Kind::kList, contain(pop_mark()));
      break;
    case kDict:
      push_new(Kind::kDict, contain_items(pop_mark()));
      break;
    case kAppend:
      extend(Kind::kList, contain(last(1)));
      break;
    case kAppends:
      extend(Kind::kList, contain(pop_mark()));
      break;
    case kSetItem:
      extend(Kind::kDict, contain_items(last(2)));
      break;
    case kSetItems:
      extend(Kind::kDict, contain_items(pop_mark()));
      break;

    case kPut:
      put(index_line());
      break;
    case kBinPut:
      put(number(1));
      break;
    case kLongBinPut:
      put(number(4));
      break;
    case kMemoize:
      put(num_puts_);
      break;
    case kGet:
      get(index_line());
      break;
    case kBinGet:
      get(number(1));
      break;
    case kLongBinGet:
      get(number(4));
      break;

    case kGlobal:
      line();
      line();
      push(kGlobalNode);
      break;
    case kStackGlobal:
      for (int i = 0; i < 2; ++i) {
        if (nodes_[pop()].kind != Kind::kString) fail("a global without a name");
      }
      push(kGlobalNode);
      break;
    case kReduce: {
      if (nodes_[top()].kind != Kind::kTuple) fail("a call without arguments");
      const int depth = contain(last(1));
      if (nodes_[pop()].kind != Kind::kGlobal) fail("a call of something that is no function");
      push_new(Kind::kObject, depth);
      break;
    }
    case kBuild:
      extend(Kind::kObject, contain(last(1)));
      break;

    default: {
      constexpr char kDigits[] = "0123456789abcdef";
      const char text[] = {'0', 'x', kDigits[opcode >> 4], kDigits[opcode & 15], 0};
      fail(std::string("opcode ") + text + ", which plain values and NumPy arrays do not need");
    }
  }
  return true;
}

}  // namespace

void scan_pickle(const std::uint8_t* data, std::size_t size) { Scanner(data, size).run(); }

}  // namespace realign
