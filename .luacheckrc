-- For the scripts as Redis gets them: tests/support/lua/lint.py puts them together and says where a line comes from.
std = "lua51"
read_globals = {"KEYS", "ARGV", "redis"}
-- What Redis's sandbox does not have, or what a script has no business with.
not_globals = {
  "arg", "collectgarbage", "debug", "dofile", "getfenv", "io", "load", "loadfile", "loadstring", "module", "newproxy", "os",
  "package", "print", "require", "setfenv",
}
max_line_length = 120
