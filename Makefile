# nbdserve: `make help` lists what there is to make.
# SPDX-License-Identifier: 0BSD
.POSIX:

CC = cc
CFLAGS = -O2 -g
CPPFLAGS =
LDFLAGS =
LDLIBS = -lpthread
AR = ar
PREFIX = /usr/local
DESTDIR =
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib
INCLUDEDIR = $(PREFIX)/include
MANDIR = $(PREFIX)/share/man
PKGCONFIGDIR = $(LIBDIR)/pkgconfig
COMPLETIONDIR = $(PREFIX)/share/bash-completion/completions
CUTS = 0
KIND = cuts
COUNT = 10000
SECONDS = 60
FILE =
COMPILERS = gcc clang tcc musl-gcc
TARGETS = s390x ppc64 mips m68k i686 armhf arm64 riscv64
SYSTEMS = aarch64-macos x86_64-macos x86_64-freebsd aarch64-freebsd \
  x86_64-netbsd x86_64-openbsd
ZIG = zig

# The strict sets: not one warning from either compiler.
GCC_STRICT = -std=c99 -O2 -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
  -Wsign-conversion -Wstrict-prototypes -Wmissing-prototypes -Wundef \
  -Wcast-qual -Wpointer-arith -Wwrite-strings -Wvla -Werror
CLANG_STRICT = -std=c99 -O2 -Weverything -Wno-padded -Wno-reserved-identifier \
  -Wno-disabled-macro-expansion -Wno-reserved-macro-identifier \
  -Wno-unreachable-code -Wno-unreachable-code-return \
  -Wno-declaration-after-statement -Werror
SWITCHES = NO_MAIN NO_FLAT NO_CAS NO_CLIENT NO_HWSHA NO_SANDBOX NO_TCP \
  NO_THREADS POSIX_ONLY

# Which tests to run (see test.sh), where it is not all of them.  Compilers and
# address errors may show in whatever runs the program or its functions, races
# where there are several threads, a switch in what it takes out or replaces.
TESTS =
BUILT_TESTS = @config @platform @util @sha @wire @io @export @handshake \
  @transmission @flat @peer @cas @server @cli
SAN_TESTS = quick @platform @util @sha @wire @io @export @transmission @flat \
  @cas @server $(CLI_TESTS) $(PEER_TESTS) testPullsPeerMayLieAboutAnything \
  testPullMayBeCutAfterEveryByte testPullRefusesATreeThatSealWouldNotMake \
  testRepairWritesNothingThatAPeerMakesUp testBlocksExportBearsGarbage \
  testPullBearsThatMemoryLacks testPullBearsThatACallFails
# The same of @peer
PEER_TESTS = testPullTakesAUriOrACommand testRepairGetsWhatAPeerHas \
  testPartOfAPullIsNobodyElsesAndGoesAfterAWeek \
  testPullOfWhatIsBeingRemovedBeginsAnew
# Where all of @cli would take too long
CLI_TESTS = testExitWithParent testForkReturnsWhenListening \
  testRunPassesTheStatusOn testSignalsEndItInOrder testSocketActivation \
  testFaultsHitTheirShareOfTheirCommand testStatsSayHowLongRequestsTook \
  testFilesComeOutOfAStoreAsTheyWentIn testExportKeepsHoles \
  testImportReadsPipes testStoreCommandsPrintJsonThatParses \
  testCommandsOnAServedStoreAreDoneByTheServer \
  testTERMOfTheServerEndsItsCommandsToo testSeveralChangesAreAllOrNone \
  testExportLeavesNoHalfFile testRepairIsACommand \
  testUsageErrorsExit2WithAMessage
# What of a store and of the command has several threads
TSAN_TESTS = quick @platform @io @export @transmission @flat @server \
  testWritersReadersAndChangesOfAStoreTogether \
  testSnapshotOfAServedVolumeAppears \
  testTwoHundredClonesAreWrittenThroughOneServer \
  testDurableWritesToAVolumeSurviveKILL testDamagedMapOfAServedStoreIsFound \
  testAListHasEachVolumeOnceWhileOthersCome testADryRunKnowsWhatIsOpen \
  testGcHoldsNobodyUpWhileItGivesSpaceBack testWhatIsTrueOnlyWhileASyncRuns \
  testWithoutAThreadWhoAsksDoesTheWork \
  testVerifyMissesNothingThatARollbackMoves \
  testPullThatEndsWaitsForWhoVerifiesWhatItHas \
  testPullSealsAMapThatACheckpointThinsOut \
  testPullsSealsCheckpointsAndVerifySideBySide \
  testRepairGoesOnWhenWhatItMendsIsRemoved \
  testNoFlushOfAStoreWaitsForManySyncs testANameThatIsGoingIsNotFreeYet \
  testWritesThatAFullStoreRefusesDoNotSync testRunPassesTheStatusOn \
  testSignalsEndItInOrder testFaultsHitTheirShareOfTheirCommand \
  testDelayedRequestsWaitTogether testStatsAreWrittenAtExitAndOnUSR1 \
  testStatsSayHowLongRequestsTook testCommandsOnAServedStoreAreDoneByTheServer \
  testCommandOfAClientThatIsGoneIsNotGoneOnWith \
  testWhatIsSentToTheControlSocketIsNotKept \
  testControlSocketOutlivesTheLackOfDescriptors testACommandWaitsForNoOther \
  testLongCommandsAtATimeAreLimited testOutputThatNobodyTakesEndsACommand \
  testReaderThatHasGoneEndsACommand \
  testSignalledServerServesItsCommandUntilItHasEnded \
  testTwoSignalsAtOnceLeaveTheCommandItsTime testForkReturnsWhenListening \
  testRepairIsACommand $(PEER_TESTS) testRepairFromAPeerBesideClients \
  testAnIdIsPulledByOneAtATime testStandardStreamsOfAStoreThatAnotherServes
NO_CAS_TESTS = quick @config @export @flat
NO_HWSHA_TESTS = quick @config @sha
NO_TCP_TESTS = @config @util @server testBadAddressesSayWhatIsGood \
  testPassedSocketIsServed testSocketActivation testRunSetsTheVariables
NO_THREADS_TESTS = quick @config @platform @io @export @transmission \
  @server $(CLI_TESTS) testPullTakesAUriOrACommand \
  testWithoutAThreadWhoAsksDoesTheWork \
  testGcGivesSpaceBack \
  testDurableWritesToAVolumeSurviveKILL testNoPowerCutLosesWhatWasFlushed \
  testEverySystemCallMayFailOnce testFullStoreIsENOSPCForTheWriteOnly
POSIX_ONLY_TESTS = @config @platform @io @flat @cas $(CLI_TESTS) $(PEER_TESTS)
# What may differ where bytes are in another order, size_t has 32 bits or char
# has no sign: the hash, each kind of message, what lies in a store.  A minute.
CROSS_TESTS = @sha @wire testHelloIsFixedNewstyleWithNoZeroes \
  testExportNameIsFollowedBy124ZeroesUnlessDeclined \
  testUnknownOptionIsUnsupAndItsDataSkipped \
  testNamesOf4096BytesWorkAndLongerOnesDoNot \
  testListGivesLongNamesAndDescriptionsWhole testInfoAndGoGiveTheSameAnswers \
  testBlockSizesComeWhenAsked testBlockSizesNotAskedForAreRequired \
  testExtendedHeadersAreEnoughForMetaContexts \
  testStatusPayloadsAreOfferedToWhoHasContexts \
  testListMetaWithoutQueriesListsAll testSetHoldsForExportName \
  testUnknownCommandIsEINVALAndInStep testDfReadOfDataAndAHoleIsData \
  testLongReadsAreSeveralChunks testStructuredReadsAreChunks \
  testHolesAmongDataLeaveEachReadItsOwnBytes \
  testExtendedRepliesCarryTheRequestsOffset \
  testExtendedRequestsReachBeyond4GiB testExtendedLengthsAreNotCutTo32Bits \
  testExtendedStatusIsOf64Bits testStatusPayloadFiltersContexts \
  testOffsetsNear2To64DoNotWrap \
  testRangesBeyondTheEndAreRefusedWithChunksToo \
  testWriteOverTheMaximumIsEINVALAndInStep testTrimAndZeroOverTheMaximumWork \
  testCookiesAreOpaqueAndMayRepeat \
  testUnalignedRequestsAreEINVALWithAMinimumBlock \
  testMixedRequestsGetTheirOneAnswer testManyPipelinedRequestsToMemory \
  testStoresOfAnotherMachineAreTheSame testIdsAreOfTheContentAlone \
  testStoreOfAnotherVersionIsNamedSo \
  testDamagedSuperblocksAreMendedFromTheOther testDamagedLogIsReadOnly \
  testSizesTakeSuffixes

all: nbdserve ## the server (default)

nbdserve: nbdserve.c nbdserve.h
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ nbdserve.c $(LDLIBS)

lib: libnbdserve.a ## the library, without main()

libnbdserve.a: nbdserve.c nbdserve.h
	mkdir -p build
	$(CC) $(CPPFLAGS) $(CFLAGS) -DNBDSERVE_NO_MAIN -c -o build/nbdserve.o \
	  nbdserve.c
	$(AR) rcs $@ build/nbdserve.o

shared: ## libnbdserve.so, with a version
	mkdir -p build
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -fPIC -shared -DNBDSERVE_NO_MAIN \
	  -Wl,-soname,libnbdserve.so.0 -o libnbdserve.so.0 nbdserve.c $(LDLIBS)

install: nbdserve libnbdserve.a ## into $(DESTDIR)$(PREFIX); make shared before
	for d in $(BINDIR) $(LIBDIR) $(INCLUDEDIR) $(MANDIR)/man1 $(MANDIR)/man3 \
	  $(PKGCONFIGDIR) $(COMPLETIONDIR); do mkdir -p "$(DESTDIR)$$d"; done
	cp nbdserve $(DESTDIR)$(BINDIR)/
	cp libnbdserve.a $(DESTDIR)$(LIBDIR)/
	! test -f libnbdserve.so.0 || cp libnbdserve.so.0 $(DESTDIR)$(LIBDIR)/
	! test -f libnbdserve.so.0 || \
	  ln -sf libnbdserve.so.0 $(DESTDIR)$(LIBDIR)/libnbdserve.so
	cp nbdserve.h $(DESTDIR)$(INCLUDEDIR)/
	./test.sh --package nbdserve.1 > $(DESTDIR)$(MANDIR)/man1/nbdserve.1
	./test.sh --package nbdserve.3 > $(DESTDIR)$(MANDIR)/man3/nbdserve.3
	PREFIX=$(PREFIX) LIBDIR=$(LIBDIR) INCLUDEDIR=$(INCLUDEDIR) \
	  ./test.sh --package nbdserve.pc > $(DESTDIR)$(PKGCONFIGDIR)/nbdserve.pc
	./test.sh --package nbdserve.bash > $(DESTDIR)$(COMPLETIONDIR)/nbdserve

uninstall: ## remove what install put there
	cd $(DESTDIR)/ && rm -f .$(BINDIR)/nbdserve .$(LIBDIR)/libnbdserve.a \
	  .$(LIBDIR)/libnbdserve.so .$(LIBDIR)/libnbdserve.so.0 \
	  .$(INCLUDEDIR)/nbdserve.h .$(MANDIR)/man1/nbdserve.1 \
	  .$(MANDIR)/man3/nbdserve.3 .$(PKGCONFIGDIR)/nbdserve.pc \
	  .$(COMPLETIONDIR)/nbdserve

dist: ## the SHA-256 of the files to vendor
	@sha256sum nbdserve.c nbdserve.h

check: nbdserve ## the test suite on ./nbdserve
	CC="$(CC)" CFLAGS="$(CFLAGS)" LDLIBS="$(LDLIBS)" ./test.sh $(TESTS)

check-cc: ## build with every compiler and run the tests of sections on each
	@mkdir -p build; \
	for c in $(COMPILERS); do \
	  case $$c in \
	    tcc) set -- tcc ;; \
	    musl-gcc) set -- musl-gcc -static -O2 ;; \
	    *) set -- $$c -O2 ;; \
	  esac; \
	  command -v $$1 >/dev/null || { echo "SKIP $$1: not installed"; continue; }; \
	  echo "== $$@"; \
	  warn=$$("$$@" -Wall -o build/nbdserve-$$1 nbdserve.c -lpthread 2>&1) || \
	    exit 1; \
	  [ -z "$$warn" ] || { echo "$$warn"; exit 1; }; \
	  NBDSERVE=$$PWD/build/nbdserve-$$1 CC=$$1 CFLAGS= \
	    ./test.sh $(SHARD) $(BUILT_TESTS) || exit 1; \
	done

# A static glibc is told by the linker that getaddrinfo needs more at run time;
# the compiler's warnings count.
check-cross: nbdserve ## build for TARGETS, test in qemu; with ZIG for SYSTEMS
	@mkdir -p build; \
	build() { \
	  out=build/nbdserve-$$1; \
	  shift; \
	  echo "== $$@"; \
	  warn=$$("$$@" -O2 -Wall -Wextra -o $$out nbdserve.c -lpthread 2>&1) && \
	    [ -z "$$warn" ] || { echo "$$warn"; exit 1; }; \
	}; \
	for t in $(TARGETS); do \
	  case $$t in \
	    ppc64) set -- powerpc64-linux-gnu-gcc qemu-ppc64 ;; \
	    i686) set -- i686-linux-gnu-gcc qemu-i386 ;; \
	    armhf) set -- arm-linux-gnueabihf-gcc qemu-arm ;; \
	    arm64) set -- aarch64-linux-gnu-gcc qemu-aarch64 ;; \
	    *) set -- $$t-linux-gnu-gcc qemu-$$t ;; \
	  esac; \
	  command -v $$1 >/dev/null || { echo "SKIP $$t: no $$1"; continue; }; \
	  build $$t $$1 -static -Wl,--no-warnings; \
	  program=$$PWD/build/nbdserve-$$t emulator=; \
	  $$program --version >/dev/null 2>&1 || \
	    emulator=$$(command -v $$2-static || command -v $$2) || \
	    { echo "SKIP $$t: built, but no $$2-static runs it"; continue; }; \
	  echo "on $$t: $${emulator:-this kernel}"; \
	  NBDSERVE=$$program EMULATOR=$$emulator HOST_CC="$(CC)" \
	    CC="$$1 -static" CFLAGS=-O1 ./test.sh $(CROSS_TESTS) || exit 1; \
	done; \
	for s in $(SYSTEMS); do \
	  command -v $(ZIG) >/dev/null || { echo "SKIP $$s: no $(ZIG)"; continue; }; \
	  build $$s $(ZIG) cc -target $$s; \
	done

check-strict: ## the strict warning sets of gcc and clang; header as C89, C++98
	@mkdir -p build; e=; \
	run() { \
	  command -v $$1 >/dev/null || { echo "SKIP $$1: not installed"; return; }; \
	  echo "$$@" | cut -c1-70; "$$@" -o build/strict.o || e=1; }; \
	for d in -DNBDSERVE_NO_MAIN=0 -DNBDSERVE_NO_MAIN; do \
	  run gcc $(GCC_STRICT) $$d -c nbdserve.c; \
	  run clang $(CLANG_STRICT) $$d -c nbdserve.c; \
	done; \
	echo '#include "nbdserve.h"' > build/header.c; \
	cp build/header.c build/header.cc; \
	run gcc -std=c89 -pedantic -Wall -Wextra -Werror -I. -c build/header.c; \
	run g++ -std=c++98 -Wall -Wextra -Werror -I. -c build/header.cc; \
	run clang++ -std=c++20 -Weverything -Wno-c++98-compat-pedantic -Wno-padded \
	  -Werror -I. -c build/header.cc; \
	[ -z "$$e" ]

check-config: ## build with each switch of [1] by itself, test what it touches
	@mkdir -p build; \
	for s in $(SWITCHES); do \
	  echo "== -DNBDSERVE_$$s"; \
	  $(CC) -O1 -Wall -Wextra -Werror -DNBDSERVE_NO_MAIN -DNBDSERVE_$$s \
	    -c -o build/config-$$s.o nbdserve.c || exit 1; \
	  case $$s in \
	    NO_MAIN) gone=' [TtDd] main$$' ;; \
	    NO_FLAT) gone=' [Tt] .*flat' ;; \
	    NO_CAS) gone=' [Tt] .*cas' tests='$(NO_CAS_TESTS)' ;; \
	    NO_HWSHA) gone=' [Tt] sha_hw' tests='$(NO_HWSHA_TESTS)' ;; \
	    NO_CLIENT) gone=' [Tt] peer_' ;; \
	    NO_SANDBOX) gone=' [Tt] os_sandbox' ;; \
	    NO_TCP) gone=' U inet_' tests='$(NO_TCP_TESTS)' ;; \
	    NO_THREADS) gone=' U pthread_' tests='$(NO_THREADS_TESTS)' ;; \
	    POSIX_ONLY) gone=' U \(fallocate\|accept4\|preadv\|memfd\)' \
	      tests='$(POSIX_ONLY_TESTS)' ;; \
	  esac; \
	  if nm build/config-$$s.o | grep "$$gone"; then \
	    echo "$$s leaves these symbols"; exit 1; fi; \
	  case $$s in NO_MAIN | NO_FLAT | NO_SANDBOX | NO_CLIENT) continue ;; esac; \
	  $(CC) -O1 -Wall -Wextra -Werror -DNBDSERVE_$$s -o build/config-$$s \
	    nbdserve.c $(LDLIBS) || exit 1; \
	  NBDSERVE=$$PWD/build/config-$$s SWITCH=$$s ./test.sh $$tests || exit 1; \
	done

check-san: ## the tests under address and undefined behaviour sanitizers
	mkdir -p build
	$(CC) -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	  -DNBDSERVE_NO_SANDBOX=1 -o build/nbdserve-san nbdserve.c $(LDLIBS)
	NBDSERVE=$$PWD/build/nbdserve-san SANITIZER=address CC="$(CC)" \
	  CFLAGS="-g -O1 -fsanitize=address,undefined" ./test.sh $(SAN_TESTS)

check-tsan: ## the tests with threads under the thread sanitizer
	mkdir -p build
	$(CC) -g -O1 -fsanitize=thread -DNBDSERVE_NO_SANDBOX=1 \
	  -o build/nbdserve-tsan nbdserve.c $(LDLIBS)
	NBDSERVE=$$PWD/build/nbdserve-tsan SANITIZER=thread CC="$(CC)" \
	  CFLAGS="-g -O1 -fsanitize=thread" ./test.sh $(TSAN_TESTS)

cov: ## line coverage of nbdserve.c by TESTS (all), and what none reaches
	@rm -rf build/cov; mkdir -p build/cov
	@./test.sh --cov cc "$$PWD/build/cov" > build/cov/cc
	@chmod +x build/cov/cc
	build/cov/cc -g -DNBDSERVE_NO_SANDBOX=1 -o build/cov/nbdserve \
	  $$PWD/nbdserve.c $(LDLIBS)
	@NBDSERVE=$$PWD/build/cov/nbdserve CC=$$PWD/build/cov/cc CFLAGS=-g \
	  GCOV_ERROR_FILE=$$PWD/build/cov/errors LDLIBS="$(LDLIBS)" \
	  ./test.sh $(TESTS) || echo 'not all tests have passed'
	@./test.sh --cov report build/cov

crash: ## cuts the power on a simulated store until it loses; CUTS=9, KIND=full
	@mkdir -p build
	@./test.sh --emit simulator > build/simulator.c
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -I. -o build/simulator \
	  build/simulator.c $(LDLIBS)
	@seed=$(SEED); [ -n "$$seed" ] || \
	  seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); \
	  echo "build/simulator $(KIND) $(CUTS) $$seed"; \
	  build/simulator $(KIND) $(CUTS) $$seed

mutate: ## forged stores, believed: refused or sound; COUNT=10000
	@mkdir -p build
	@./test.sh --emit mutate > build/mutate.c
	$(CC) -g -O1 -fsanitize=address,undefined \
	  -fno-sanitize-recover=undefined -I. -o build/mutate build/mutate.c \
	  $(LDLIBS)
	@seed=$(SEED); [ -n "$$seed" ] || \
	  seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' '); \
	  echo "build/mutate $(COUNT) $$seed"; build/mutate $(COUNT) $$seed

fuzz: nbdserve ## what clients (transcripts) and peers send; SECONDS=60
	@mkdir -p build/corpus build/found
	@[ -n "$$(ls build/corpus)" ] || CORPUS=$$PWD/build/corpus \
	  ./test.sh -- testBadInputNeitherHurtsOthersNorLeaks
	@for last in 340 341 342 343 344 346 354 364 374; do \
	  printf "\\$$last" >build/corpus/peer$$last; done # see z_peer
	@./test.sh --emit fuzz > build/fuzz.c
	@clang -g -O1 -fsanitize=fuzzer,address,undefined -I. -o build/fuzz \
	  build/fuzz.c $(LDLIBS) || { echo 'SKIP fuzz: no clang with libFuzzer'; \
	  exit 0; }; echo build/fuzz; build/fuzz -max_total_time=$(SECONDS) \
	  -max_len=300000 -timeout=20 -artifact_prefix=build/found/ build/corpus

check-symbols: libnbdserve.a ## the library defines only nbdserve_*
	@! nm -g --defined-only libnbdserve.a | grep ' [A-Z] ' | \
	  grep -v ' nbdserve_'
	@echo "only nbdserve_* is global"

lint: ## format, lines, functions, statements, cppcheck, shellcheck
	@./test.sh --lint
	@! grep -nE '.{81,}' test.sh Makefile .ci/run || \
	  { echo 'over 80 columns'; exit 1; }
	@! grep -nE '[[:space:]]+$$' test.sh README .ci/run || \
	  { echo 'trailing blanks'; exit 1; }
	@if command -v shellcheck >/dev/null; then \
	  sed '/^\. shunit2/,$$d' test.sh | shellcheck -s sh - && \
	  shellcheck .ci/run; \
	  else echo 'SKIP shellcheck: not installed'; fi
	@if command -v cppcheck >/dev/null; then \
	  cppcheck --quiet --error-exitcode=1 --std=c99 \
	    --enable=warning,performance,portability --inline-suppr \
	    --suppress=missingIncludeSystem --suppress=toomanyconfigs nbdserve.c; \
	  else echo 'SKIP cppcheck: not installed'; fi

figures: ## how nbdserve.c reads, in numbers; or FILE=other.c
	@./test.sh --figures $(FILE)

bench: nbdserve ## a table against nbdkit, qemu-nbd and nbd-server
	CC="$(CC)" LDLIBS="$(LDLIBS)" ./test.sh --bench

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1: \2/p' Makefile | \
	  awk -F': ' '{printf "%-14s %s\n", $$1, $$2}'

clean: ## remove what was built
	rm -rf build nbdserve libnbdserve.a libnbdserve.so.0

.PHONY: all lib shared install uninstall dist check check-cc check-cross \
  check-strict check-config check-san check-tsan cov crash mutate fuzz \
  check-symbols lint figures bench help clean
