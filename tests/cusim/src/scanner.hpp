// The words of a PTX text.
#pragma once
#include <cctype>
#include <string>
#include <vector>

#include "cusim.hpp"

namespace cusim {

class Scanner {
 public:
  explicit Scanner(const std::string& text) : s_(text), lines_(std::make_shared<std::vector<std::string>>()) {
    *lines_ = split_lines(text);
  }

 protected:
  const std::string& s_;
  size_t p_ = 0;
  int line_ = 1;
  std::shared_ptr<std::vector<std::string>> lines_;

  [[noreturn]] void bad(const std::string& what) {
    throw Fault("PTX line " + std::to_string(line_) + ": " + what +
                (line_ <= (int)lines_->size() ? "\n    " + (*lines_)[line_ - 1] : ""));
  }
  void skip() {
    while (p_ < s_.size()) {
      char c = s_[p_];
      if (c == '\n') {
        ++line_;
        ++p_;
      } else if (isspace((unsigned char)c))
        ++p_;
      else if (c == '/' && s_[p_ + 1] == '/') {
        while (p_ < s_.size() && s_[p_] != '\n') ++p_;
      } else if (c == '/' && s_[p_ + 1] == '*') {
        while (p_ < s_.size() && !(s_[p_] == '*' && s_[p_ + 1] == '/')) {
          if (s_[p_] == '\n') ++line_;
          ++p_;
        }
        p_ += 2;
      } else if (c == '\0')
        ++p_;
      else
        break;
    }
  }
  static bool word_char(char c) {
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.' || c == ':';
  }
  std::string word() {
    skip();
    size_t b = p_;
    while (p_ < s_.size() && word_char(s_[p_])) {
      if (s_[p_] == ':' && !(p_ + 1 < s_.size() && s_[p_ + 1] == ':')) {
        if (p_ > b && s_[p_ - 1] == ':') {
          ++p_;
          continue;
        }
        break;
      }
      ++p_;
    }
    return s_.substr(b, p_ - b);
  }
  bool eat(char c) {
    skip();
    if (p_ < s_.size() && s_[p_] == c) {
      ++p_;
      return true;
    }
    return false;
  }
  void need(char c) {
    if (!eat(c)) bad(std::string("expected '") + c + "'");
  }
  std::string until(char end) {
    std::string out;
    while (p_ < s_.size() && s_[p_] != end) {
      if (end != '"' && s_[p_] == '/' && p_ + 1 < s_.size() && s_[p_ + 1] == '/') {  // no comment in a string
        while (s_[p_] != '\n') ++p_;
        continue;
      }
      if (s_[p_] == '\n') {
        ++line_;
        out += ' ';
      } else
        out += s_[p_];
      ++p_;
    }
    ++p_;
    return out;
  }
  static std::string trim(const std::string& x) {
    size_t a = x.find_first_not_of(" \t\r\n"), b = x.find_last_not_of(" \t\r\n");
    return a == std::string::npos ? "" : x.substr(a, b - a + 1);
  }
  static std::vector<std::string> split(const std::string& x, char by) {
    std::vector<std::string> out;
    std::string cur;
    int d = 0;
    for (char c : x) {
      if (c == '{' || c == '[' || c == '(') ++d;
      if (c == '}' || c == ']' || c == ')') --d;
      if (c == by && d == 0) {
        out.push_back(trim(cur));
        cur.clear();
      } else
        cur += c;
    }
    if (!trim(cur).empty()) out.push_back(trim(cur));
    return out;
  }
  static std::vector<std::string> split_lines(const std::string& text) {
    std::vector<std::string> out(1);
    for (char c : text) {
      if (c == '\n')
        out.emplace_back();
      else
        out.back() += c;
    }
    return out;
  }
  static std::vector<std::string> split_words(const std::string& text) {
    std::vector<std::string> out;
    std::string word;
    for (char c : text + " ") {
      if (!isspace((unsigned char)c)) {
        word += c;
      } else if (!word.empty()) {
        out.push_back(word);
        word.clear();
      }
    }
    return out;
  }
};

}  // namespace cusim
