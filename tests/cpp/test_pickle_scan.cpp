// The scan of pickles: what it admits, what it refuses, and that no bytes whatever make it do anything else.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "pickle_scan.h"

namespace {

// Empty where the scan admits the pickle.
std::string refusal(const std::string& pickle) {
  // Its own block of exactly this size: a byte read too many is seen.
  const std::unique_ptr<uint8_t[]> block(new uint8_t[pickle.size()]);
  if (!pickle.empty()) std::memcpy(block.get(), pickle.data(), pickle.size());
  try {
    realign::scan_pickle(block.get(), pickle.size());
  } catch (const std::invalid_argument& error) {
    CHECK(std::strncmp(error.what(), "byte ", 5) == 0, "'%s' names no byte", error.what());
    return error.what();
  }
  return "";
}

void check_refused(const std::string& pickle, const char* why) {
  const std::string found = refusal(pickle);
  CHECK(found.find(why) != std::string::npos, "expected a refusal with '%s', got '%s'", why, found.c_str());
}

std::string from_hex(const char* hex) {
  std::string bytes;
  for (; *hex; hex += 2) bytes.push_back(char(std::stoi(std::string(hex, 2), nullptr, 16)));
  return bytes;
}

// [{"id": 0, "embed": a float32 array of 3}, {"id": "b", "embed": [0.5, -1.0]}, {"id": None, "embed": (True, b"x")}],
// as pickled by CPython with NumPy in protocols 0, 2, 4 and 5.
const char* const kPickles[] = {
    "286c70300a286470310a5669640a70320a49300a7356656d6265640a70330a636e756d70792e5f636f72652e6d756c746961727261790a"
    "5f7265636f6e7374727563740a70340a28636e756d70790a6e6461727261790a70350a2849300a7470360a635f636f646563730a656e63"
    "6f64650a70370a2856620a70380a566c6174696e310a70390a747031300a527031310a747031320a527031330a2849310a2849330a7470"
    "31340a636e756d70790a64747970650a7031350a285666340a7031360a4930300a4930310a747031370a527031380a2849330a563c0a70"
    "31390a4e4e4e492d310a492d310a49300a747032300a624930300a67370a28565c75303030305c7530303030803f5c75303030305c7530"
    "3030305c7530303030c05c75303030305c75303030305c75303030303f0a7032310a67390a747032320a527032330a747032340a627361"
    "28647032350a67320a56620a7032360a7367330a286c7032370a46302e350a61462d312e300a61736128647032380a67320a4e7367330a"
    "284930310a67370a2856780a7032390a67390a747033300a527033310a747033320a73612e",
    "80025d7100287d7101285802000000696471024b005805000000656d6265647103636e756d70792e5f636f72652e6d756c746961727261"
    "790a5f7265636f6e7374727563740a7104636e756d70790a6e6461727261790a71054b00857106635f636f646563730a656e636f64650a"
    "7107580100000062710858060000006c6174696e31710986710a52710b87710c52710d284b014b0385710e636e756d70790a6474797065"
    "0a710f5802000000663471108988877111527112284b0358010000003c71134e4e4e4affffffff4affffffff4b0074711462896807580e"
    "0000000000c2803f000000c3800000003f7115680986711652711774711862757d7119286802580100000062711a68035d711b28473fe0"
    "00000000000047bff000000000000065757d711c2868024e6803886807580100000078711d680986711e52711f86712075652e",
    "800495de000000000000005d94287d94288c026964944b008c05656d626564948c166e756d70792e5f636f72652e6d756c746961727261"
    "79948c0c5f7265636f6e7374727563749493948c056e756d7079948c076e6461727261799493944b0085944301629487945294284b014b"
    "03859468078c0564747970659493948c02663494898887945294284b038c013c944e4e4e4affffffff4affffffff4b0074946289430c00"
    "00803f000000c00000003f94749462757d942868028c01629468035d9428473fe000000000000047bff000000000000065757d94286802"
    "4e68038843017894869475652e",
    "800595c9000000000000005d94287d94288c026964944b008c05656d626564948c136e756d70792e5f636f72652e6e756d65726963948c"
    "0b5f66726f6d62756666657294939428960c000000000000000000803f000000c00000003f948c056e756d7079948c0564747970659493"
    "948c02663494898887945294284b038c013c944e4e4e4affffffff4affffffff4b007494624b0385948c01439474945294757d94286802"
    "8c01629468035d9428473fe000000000000047bff000000000000065757d942868024e68038843017894869475652e",
};

std::string repeated(const char* text, int count) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

void test_pickles_are_admitted_and_their_parts_are_not() {
  for (const char* hex : kPickles) {
    const std::string pickle = from_hex(hex);
    const std::string found = refusal(pickle);
    CHECK(found.empty(), "%s", found.c_str());
    for (size_t size = 0; size < pickle.size(); ++size) CHECK(!refusal(pickle.substr(0, size)).empty(), "%zu", size);
    check_refused(pickle + "N.", "bytes follow");
  }
}

void test_random_bytes() {
  Random random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string bytes(random.below(200), 0);
    for (char& byte : bytes) byte = char(random.bits());
    refusal(bytes);
  }
}

// Random bytes hardly get beyond the first opcode; these go far.
void test_random_opcodes() {
  const std::string opcodes =
      "(.FIJKLMNRSTUVXabcd}eghjl]pqrst)uBCG\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95\x96";
  Random random(2);
  for (int round = 0; round < 50000; ++round) {
    std::string bytes;
    for (uint64_t left = random.below(300); left > 0; --left) {
      const uint64_t kind = random.below(8);
      if (kind < 4)
        bytes += opcodes[random.below(opcodes.size())];
      else if (kind < 6)
        bytes += "(]}t)N\x85\x94"[random.below(8)];
      else if (kind == 6)
        bytes += char(random.below(4));
      else
        bytes += "1\n"[random.below(2)];
    }
    refusal(bytes + ".");
  }
}

void test_mutated_pickles() {
  Random random(3);
  for (const char* hex : kPickles) {
    const std::string pickle = from_hex(hex);
    for (int round = 0; round < 20000; ++round) {
      std::string bytes = pickle;
      for (uint64_t left = 1 + random.below(4); left > 0 && !bytes.empty(); --left) {
        const size_t at = random.below(bytes.size());
        const uint64_t kind = random.below(5);
        if (kind == 0) bytes[at] = char(random.bits());
        if (kind == 1) bytes[at] = char(bytes[at] ^ (1 << random.below(8)));
        if (kind == 2) bytes.erase(at, 1 + random.below(8));
        if (kind == 3) bytes.insert(at, bytes.substr(random.below(bytes.size()), random.below(16)));
        if (kind == 4) bytes[at] = char(random.below(2) ? 0xff : 0);
      }
      refusal(bytes);
    }
  }
}

void test_deep_nesting() {
  const int most = realign::kMaxPickleDepth;
  const struct {
    const char *open, *close;
  } shapes[] = {{"", "\x85"}, {"(", "t"}, {"]", "a"}, {"(", "l"}, {"(N", "d"}, {"}N", "s"}, {"](", "e"}, {"}(N", "u"}};
  for (const auto& shape : shapes) {
    const auto nested = [&](int depth) {
      return repeated(shape.open, depth) + "N" + repeated(shape.close, depth) + ".";
    };
    CHECK(refusal(nested(most)).empty(), "%s %s: %s", shape.open, shape.close, refusal(nested(most)).c_str());
    check_refused(nested(most + 1), "nested deeper");
    check_refused(nested(1000000), "nested deeper");
  }
  check_refused(repeated("(", 1000000) + ".", "takes values");
  check_refused(repeated("]", 1000000) + ".", "left over");
  // A list that is put into others and grows afterwards.
  check_refused(std::string("]\x94h") + '\0' + "h" + '\0' + "a.", "another one holds");
}

void test_lengths_and_memo_indices_are_bounded() {
  check_refused("B\xff\xff\xff\xff.", "truncated");
  check_refused("\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "truncated");
  check_refused("\x8b\xff\xff\xff\x7f.", "too long");
  check_refused("I" + std::string(100, '1') + "\n.", "too long");
  check_refused("Nr\xff\xff\xff\xff.", "out of order");
  check_refused("Np99999999999\n.", "no number");
  check_refused("Np9999999999\n.", "out of order");
  check_refused("j\xff\xff\xff\xff.", "is not set");
  check_refused("\x80\x06N.", "protocol");
  check_refused("", "truncated");
}

void test_what_runs_code_is_refused() {
  check_refused(
      "c__builtin__\neval\n\x94"
      "0.",
      "opcode 0x30");
  for (const char* opcode :
       {"i", "o", "P", "Q", "\x81", "\x82", "\x83", "\x84", "\x8f", "\x90", "\x91", "\x92", "\x97", "\x98"})
    check_refused(std::string("N") + opcode, "opcode 0x");
}

}  // namespace

int main() {
  test_pickles_are_admitted_and_their_parts_are_not();
  test_random_bytes();
  test_random_opcodes();
  test_mutated_pickles();
  test_deep_nesting();
  test_lengths_and_memo_indices_are_bounded();
  test_what_runs_code_is_refused();
  std::puts("pickle_scan: passed");
}
