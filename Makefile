# collabd: `make run` serves on port 8080, `make test` proves it; `make help`.

PREFIX  = /usr/local
BINDIR  = $(PREFIX)/sbin
MANDIR  = $(PREFIX)/share/man
DESTDIR =
INSTALL = install
BUILD   = build

# GNU make predefines CC, so ?= would do nothing.
ifneq ($(HOST),)
CROSS_COMPILE ?= $(HOST)-
endif
ifeq ($(origin CC),default)
CC := $(CROSS_COMPILE)$(if $(CROSS_COMPILE),gcc,cc)
endif
STRIP      ?= $(CROSS_COMPILE)strip
PKG_CONFIG ?= $(CROSS_COMPILE)pkg-config

WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
           -Werror=switch -Werror=implicit-function-declaration
OURS     = -std=c11 $(WARN) -ffunction-sections -fdata-sections \
           -fno-asynchronous-unwind-tables -fno-unwind-tables -fno-plt
CFLAGS   = -O2
CPPFLAGS =
LDFLAGS  =
OUR_LD   = -Wl,--gc-sections -Wl,-z,noseparate-code -Wl,-z,relro,-z,now -Wl,--build-id=none

# The .pc files are absent with Debian's wslay and mbedTLS 2.28.
pc = $(shell $(PKG_CONFIG) $(1) 2>/dev/null || echo $(2))
LDLIBS = -pthread $(call pc,--libs libwslay,-lwslay) \
         $(call pc,--libs mbedtls mbedx509 mbedcrypto,-lmbedtls -lmbedx509 -lmbedcrypto)

.DEFAULT_GOAL = all
.DELETE_ON_ERROR:
.PHONY: all run deps test test-deps unit e2e fuzz fuzz-short bench bench-quick \
        asan valgrind lint format size install uninstall dist clean help

all: $(BUILD)/collabd ## build build/collabd

$(BUILD):
	mkdir -p $@

$(BUILD)/collabd: collabd.c collabd.h | $(BUILD)
	$(CC) $(OURS) $(CPPFLAGS) $(CFLAGS) collabd.c -o $@ $(OUR_LD) $(LDFLAGS) $(LDLIBS)

run: deps ## install what the build lacks, build, serve on port 8080
	$(MAKE) all
	$(BUILD)/collabd --listen 8080 $(ARGS)

deps:
	port/debian/deps build

install: all ## install below DESTDIR and PREFIX
	$(INSTALL) -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(MANDIR)/man8
	$(INSTALL) -m 755 $(BUILD)/collabd $(DESTDIR)$(BINDIR)/collabd
	$(INSTALL) -m 644 port/man/collabd.8 $(DESTDIR)$(MANDIR)/man8/collabd.8

uninstall: ## remove what install put there
	rm -f $(DESTDIR)$(BINDIR)/collabd $(DESTDIR)$(MANDIR)/man8/collabd.8

clean: ## remove build/
	rm -rf $(BUILD)

dist: ## a tarball of the tagged version
	git archive --prefix=collabd-$(VERSION)/ -o $(BUILD)/collabd-$(VERSION).tar.gz v$(VERSION)

VERSION = $(shell sed -n 's/.*COLLABD_VERSION "\(.*\)".*/\1/p' collabd.h)

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "variables: CC CFLAGS CPPFLAGS LDFLAGS CROSS_COMPILE HOST PREFIX DESTDIR BUILD ARGS"

include tests/tests.mk
