// Prints scores of all subnets and one prediction as JSON: stepping FOLDER images.bin BATCH [RULE=NUMBER ...]
#include <cstdlib>
#include <iostream>
#include <iterator>

#include "stepping.hpp"

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: stepping FOLDER images.bin BATCH [max_prob=0.9] [deadline=0.02]");
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<float> images(bytes.size() / sizeof(float));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(images.data()));
  const size_t batch = std::strtoul(argv[3], nullptr, 10);
  stepping::Rules until;
  double deadline = stepping::FOREVER;
  for (int k = 4; k < argc; ++k) {
    const std::string text = argv[k];
    const auto equals = text.find('=');
    const double number = std::stod(text.substr(equals + 1));
    if (text.substr(0, equals) == "deadline") deadline = number;
    else until[text.substr(0, equals)] = number;
  }

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "stepping");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  stepping::Model model(env, argv[1], options);
  nlohmann::json scores = nlohmann::json::array();
  auto session = model.start(images, batch);
  while (true) {
    scores.push_back(std::vector<float>(session.logits(), session.logits() + batch * session.classes()));
    if (session.subnet() == model.num_subnets()) break;
    session.step();
  }
  const auto answer = model.predict(images, batch, until, deadline);
  std::cout << nlohmann::json{{"scores", scores},
                              {"logits", answer.logits},
                              {"subnet", answer.subnet},
                              {"macs", answer.macs},
                              {"in_time", answer.in_time}}
            << std::endl;
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
