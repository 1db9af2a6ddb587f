# How the tests are built and run; included by the Makefile.  tests/README.md
# says what each proves.

TEST_LIBS = -lcmocka $(LDLIBS)
TEST_WARN = $(WARN) -Wno-unused-function -Werror
UNITS     = $(patsubst tests/unit/%.c,%,$(wildcard tests/unit/test_*.c))
FUZZERS   = $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
SANITIZE  = -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
FUZZ_SECONDS ?= 600

test-deps:
	port/debian/deps test
	cd tests && npm install --silent --no-audit --no-fund --no-package-lock

test: test-deps ## install what the tests lack, run all of them
	tests/run.sh

unit: $(UNITS:%=$(BUILD)/unit/%) ## unit tests under ASan and UBSan
	@set -e; for t in $^; do echo "== $$t"; $$t; done

e2e: all ## end-to-end tests against build/collabd
	cd tests && node --test e2e/

asan: $(BUILD)/asan/collabd

$(BUILD)/unit/%: tests/unit/%.c tests/unit/test.h collabd.c collabd.h
	@mkdir -p $(@D)
	$(CC) -std=c11 $(TEST_WARN) $(SANITIZE) $(CPPFLAGS) $< -o $@ $(LDFLAGS) $(TEST_LIBS)

# Without sanitizers, for valgrind.
$(BUILD)/valgrind/%: tests/unit/%.c tests/unit/test.h collabd.c collabd.h
	@mkdir -p $(@D)
	$(CC) -std=c11 $(TEST_WARN) -g -O1 $(CPPFLAGS) $< -o $@ $(LDFLAGS) $(TEST_LIBS)

# The crash tests of test_docs fork for every system call: minutes there.
valgrind: $(patsubst %,$(BUILD)/valgrind/%,$(filter-out test_docs,$(UNITS))) ## unit tests under valgrind
	@set -e; for t in $^; do echo "== $$t"; COLLABD_SLOW=1 \
	    valgrind -q --error-exitcode=9 --leak-check=full $$t; done

$(BUILD)/asan/collabd: collabd.c collabd.h
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) $(SANITIZE) collabd.c -o $@ $(LDFLAGS) $(LDLIBS)

$(BUILD)/fuzz/%: tests/fuzz/%.c collabd.c collabd.h
	@mkdir -p $(@D)
	clang -std=c11 $(TEST_WARN) -g -O1 -fsanitize=fuzzer,address,undefined \
	    -fno-sanitize-recover=undefined $< -o $@ $(LDLIBS)

fuzz: $(FUZZERS:%=$(BUILD)/fuzz/%) ## fuzz each parser for FUZZ_SECONDS
	@set -e; for f in $^; do n=$${f##*/}; mkdir -p $(BUILD)/corpus/$$n; \
	    echo "== $$n"; $$f -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 \
	    -print_final_stats=1 -verbosity=0 -artifact_prefix=$(BUILD)/corpus/ \
	    $(BUILD)/corpus/$$n tests/fuzz/corpus/$${n#fuzz_}; done

# ----- bench -------------------------------------------------------------------

BENCH_OUT = $(BUILD)/bench
$(BENCH_OUT)/load: tests/bench/load.c tests/bench/bench.h
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) -O2 $< -o $@

$(BENCH_OUT)/docload: tests/bench/docload.c tests/bench/bench.h
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) -O2 $< -o $@

$(BENCH_OUT)/floor: tests/bench/floor.c
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) -O2 $< -o $@ $(LDLIBS)

$(BENCH_OUT)/allocs.so: tests/bench/allocs.c
	@mkdir -p $(@D)
	$(CC) -std=c11 $(WARN) -O2 -fPIC -shared $< -o $@ -ldl

bench-build: all $(BENCH_OUT)/load $(BENCH_OUT)/docload $(BENCH_OUT)/floor $(BENCH_OUT)/allocs.so
	-$(CC) -std=c11 -O2 tests/bench/lws_relay.c -o $(BENCH_OUT)/lws_relay \
	    $(call pc,--cflags --libs libwebsockets,-lwebsockets -lcap)

bench: bench-build ## measure against the floor, libwebsockets and ws
	tests/bench/bench.sh
	tests/bench/docs.sh

bench-quick: bench-build ## the same, in half a minute
	tests/bench/bench.sh quick
	tests/bench/docs.sh quick

size: ## size of the stripped -Os executable, and the memory sum
	@mkdir -p $(BUILD)/size
	@$(MAKE) -s BUILD=$(BUILD)/size CFLAGS=-Os LDFLAGS=-s all
	@printf 'executable: %s bytes\n' "$$(stat -c %s $(BUILD)/size/collabd)"
	@$(BUILD)/size/collabd --show-memory

# ----- lint --------------------------------------------------------------------

lint: all ## warnings as errors with gcc and clang, clang-tidy, cppcheck, papers
	gcc -std=c11 $(WARN) -Werror -O2 -fsyntax-only collabd.c
	clang -std=c11 $(WARN) -Werror -O2 -fsyntax-only collabd.c
	gcc -std=c11 $(WARN) -Werror -O2 -DCOLLABD_TLS=0 -fsyntax-only collabd.c
	clang-tidy --quiet --warnings-as-errors='*' collabd.c -- -std=c11 2>/dev/null
	cppcheck --quiet --std=c11 --enable=warning,performance,portability \
	    --inline-suppr --suppress=missingIncludeSystem -UCOLLABD_LOCAL --error-exitcode=1 collabd.c
	shellcheck port/debian/deps tests/run.sh tests/bench/bench.sh tests/bench/docs.sh tests/cross.sh .ci/run tests/lint/*.sh
	tests/lint/book.sh
	node tests/lint/man.js
