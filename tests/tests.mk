# How the tests are built and run; included by the Makefile.

test-deps:
	port/debian/deps test
	cd tests && npm install --silent --no-audit --no-fund --no-package-lock

test: test-deps ## install what the tests lack, run them all
	$(MAKE) all
	$(MAKE) e2e

e2e: all ## end-to-end tests against build/collabd
	cd tests && node --test e2e/
