#!/bin/sh
# test.sh - the tests of nbdserve.
# SPDX-License-Identifier: 0BSD (full text at the end of nbdserve.h)
#
#   ./test.sh                   all tests; the last line counts them
#   ./test.sh quick             a choice from every group, under 20 s
#   ./test.sh @cas testName...  some groups and some tests
#   ./test.sh --shard 1/2 ...   one of two parts that take equally long
#   ./test.sh --list ...        prints which tests these are
#   ./test.sh --emit NAME       prints a C program: client, unit, fault,
#                               simulator, mutate, deny, sandbox, connect,
#                               syncs, fuzz, bench
#   ./test.sh --bench           a table against the servers that are installed
#   ./test.sh --figures [FILE]  how nbdserve.c, or a C file, reads in numbers
#   ./test.sh --lint            what the files have against the rules
#   ./test.sh --cov report DIR  what of nbdserve.c ran: see make cov
#   ./test.sh --package FILE    prints nbdserve.1, nbdserve.3, nbdserve.pc or
#                               nbdserve.bash, for make install
#
# ---- Map ------------------------------------------------------------------
# A group has the number of the section of nbdserve.c whose promises its tests
# check.  `grep -n '==== \[' test.sh` prints where it begins.
#
#   [1]  CONFIG        @config        compile-time switches
#   [2]  PLATFORM      @platform      system calls that fail or are missing
#   [3]  UTIL          @util          numbers, names, log lines
#   [4]  SHA-256       @sha           the hash, by all ways
#   [5]  WIRE          @wire          what is true of each command and error
#   [6]  SOCKET I/O    @io            deadlines, clients that do not read
#   [7]  EXPORT        @export        exports, a host's functions
#   [8]  HANDSHAKE     @handshake     each option and its answer
#   [9]  TRANSMISSION  @transmission  each request and its answer
#   [10] FLAT          @flat          files, devices, memory
#   [11] CLIENT        @peer          our client: pull, repair from a peer
#   [12] CAS           @cas           stores: contents, damage, power cuts
#   [13] SERVER        @server        sockets, many clients, starting, stopping
#   [14] CLI           @cli           options, commands, exit statuses
#   [15] SOURCE        @source        README, header, the files themselves
#   [16] CLIENTS       @clients       other people's clients
#
# Environment: NBDSERVE  the program to test (./nbdserve, made if missing)
#   CC, CFLAGS, LDLIBS     build the C programs and the README's examples
#   HOST_CC ($CC)          builds the C programs that only talk to the program,
#                          where CC builds for another machine
#   EMULATOR               runs what is built for that machine
#   SEED                   repeats the random choices of the run that printed it
#   BIG (64M)              size of the image that nbdcopy moves
#   SWITCH                 -DNBDSERVE_$SWITCH is how the program was built
#   SANITIZER              the program's memory is not its own
#   POWER_CUTS (500)       in each of four histories of a store; 100 or 10 in a
#                          build that is_variant
#   CORPUS                 the directory that gets what clients sent
#
# This file is sh up to the line ". shunit2", which ends the shell with exit,
# and C behind it, in sections that start with "//== PROGRAM...": a program is
# all sections that name it.  shunit2 finds tests with grep: no C line may begin
# with a word "test..." and "()".
# shellcheck disable=SC2016,SC2034 # text for other shells, names used by req

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
self=$here/$(basename -- "$0")

# Prints a C program, with the line numbers of this file
emit() {
  awk -v name="$1" '
    $1 == "//==" {
      on = 0
      for (i = 2; i <= NF; i++) if ($i == name) on = found = 1
      if (on) printf "#line %d \"test.sh\"\n", NR + 1
      next
    }
    on
    END { exit !found }' "$self"
}
if [ "${1-}" = --emit ]; then
  emit "${2-}"
  exit
fi

CC=${CC:-cc} NBDSERVE=${NBDSERVE:-$here/nbdserve}

# ==== make figures, make lint ================================================

# How a C file reads, one "FIGURE VALUE" a line, and what it should not have as
# "bad LINE: WHAT".  Lines of code hold more than comment; a lone assert fills
# its lines alone.  A function starts in the line of its name, and has a comment
# if that ends right above it, in its first four lines.
measure() { # file
  awk '
    # The line without comments and with x in place of what literals hold;
    # the state goes on in the next line
    function code(l,  out, c) {
      commented = state == "/*"
      while (l != "") {
        if (state == "/*") {
          if (!match(l, /\*\//)) return out
          l = substr(l, RSTART + 2)
          state = ""
        } else if (state != "") {
          c = substr(l, 1, 1)
          if (c == "\\") { out = out "xx"; l = substr(l, 3); continue }
          if (c == state) { out = out c; state = "" } else out = out "x"
          l = substr(l, 2)
        } else if (match(l, /"|\047|\/\*|\/\//)) {
          out = out substr(l, 1, RSTART - 1)
          c = substr(l, RSTART, RLENGTH)
          l = substr(l, RSTART + RLENGTH)
          if (c == "//") { commented = 1; return out }
          if (c == "/*") commented = 1; else out = out c
          state = c
        } else { out = out l; l = "" }
      }
      return out
    }
    # Is there a comment right above the line?
    function led(n,  i) {
      for (i = n - 1; i > n - 4 && i > 0; i--)
        if (text[i] ~ /^[ \t]*$|(\*\/|}|;)[ \t]*$/) break
      return text[i] ~ /\*\/[ \t]*$/
    }
    # Follows braces and parentheses to find functions and lone asserts
    function walk(l, n,  c, i) {
      while (match(l, /[(){};=]/)) {
        c = substr(l, RSTART, 1)
        if (c == "(" && !round++ && !curly) { name_line = n; has_round = 1 }
        if (c == ")") round--
        if (c == "=" && !curly && !round) has_value = 1
        if (c == "{" && !round && !curly++) {
          begun = has_round && !has_value ? name_line : 0
          head = substr(text[begun], 1, 60)
        }
        if (c == "}" && !round && !--curly && begun) {
          size[++functions] = n - begun + 1
          if (led(begun)) comments_above++
          if (n - begun >= 80) print "bad " begun ": " n - begun + 1 \
            " lines, over 80: " head
          begun = 0
        }
        if (!round && !curly && (c == ";" || c == "}"))
          has_round = has_value = 0
        l = substr(l, RSTART + 1)
      }
    }
    {
      text[NR] = $0
      c = code($0)
      if (length($0) > 80) { wide++; print "bad " NR ": over 80 columns" }
      if ($0 ~ /[ \t]$/) print "bad " NR ": a blank at the end"
      if (c !~ /[^ \t]/) { if (commented) comments++; next }
      lines++
      l = c
      while (match(l, /(^|[^A-Za-z0-9_])(assert|STATIC_ASSERT) *\(/)) {
        l = substr(l, RSTART + RLENGTH)
        asserts++
      }
      if (alone) lone++
      else if (c ~ /^ *(assert|STATIC_ASSERT)\(/) { lone++; alone = 1 }
      if (alone && c ~ /; *$/) alone = 0
      l = c
      while (match(l, /(^|[^A-Za-z0-9_])for *\([^;]*;[^;]*;/))
        l = substr(l, 1, RSTART - 1) "for(" substr(l, RSTART + RLENGTH)
      if (gsub(/;/, "", l) > 1) {
        packed++
        print "bad " NR ": several statements"
      }
      if (c ~ /^#/ || macro) macro = c ~ /\\$/
      else walk(c, NR)
    }
    END {
      print "code", lines + 0
      print "lone", lone + 0
      printf "comment %.2f\n", lines ? comments / lines : 0
      printf "above %.0f\n", functions ? 100 * comments_above / functions : 0
      printf "asserts %.0f\n", lines ? 1000 * asserts / lines : 0
      print "packed", packed + 0
      print "wide", wide + 0
      for (i = 1; i <= functions; i++) # insertion sort
        for (k = i; k > 1 && size[k - 1] > size[k]; k--) {
          n = size[k]; size[k] = size[k - 1]; size[k - 1] = n
        }
      print "functions", functions + 0
      printf "median %d\np90 %d\nlongest %d\n", size[int(functions / 2) + 1],
        size[int(functions * 9 / 10) + 1], size[functions]
    }' "$1"
}
# Is clang-format there, and the version whose layout is the files'?
formatter() {
  case $(clang-format --version 2>/dev/null) in
    *version\ 14.*) ;;
    '') echo 'SKIP clang-format: not installed'; return 1 ;;
    *) echo 'SKIP clang-format: it is not version 14'; return 1 ;;
  esac
}
# The C part of this file
c_part() { sed '1,/^\. shunit2$/d' "$self"; }
unformatted() { # file: how many lines are otherwise
  clang-format -style=file <"$1" >"$scratch/formatted"
  diff "$1" "$scratch/formatted" | grep -c '^[<>]'
}
figures() { # file
  measure "$1" >"$scratch/figures"
  figure() { sed -n "s/^$1 //p" "$scratch/figures"; }
  row() { printf '%-46s%14s   %s\n' "$@"; }
  row "$(basename "$1")" '' goal
  row 'lines of code' "$(figure code)" ''
  row 'without lone asserts' "$(($(figure code) - $(figure lone)))" '<= 6500'
  row 'comment lines per line of code' "$(figure comment)" '>= 0.30'
  row 'functions with a comment right above' "$(figure above) %" '>= 90 %'
  row 'asserts per 1,000 lines of code' "$(figure asserts)" '>= 25'
  row 'lines with several statements' "$(figure packed)" 0
  row "lines of $(figure functions) functions: median, p90, longest" \
    "$(figure median), $(figure p90), $(figure longest)" '<= 13, <= 40, <= 80'
  row 'lines over 80 columns' "$(figure wide)" 0
  ! formatter || row 'lines clang-format would change' "$(unformatted "$1")" 0
}
lint() {
  bad=0 formatter=1
  formatter || formatter=0
  c_part >"$scratch/test.c"
  for file in nbdserve.c nbdserve.h test.sh; do
    source=$here/$file from=0
    [ $file != test.sh ] || {
      source=$scratch/test.c
      from=$(($(wc -l <"$self") - $(wc -l <"$source")))
    }
    measure "$source" >"$scratch/figures"
    awk -v file="$file" -v from="$from" '
      sub(/^bad /, "") { print file ":" $1 + from substr($0, index($0, ":"));
        found = 1 }
      END { exit found }' "$scratch/figures" || bad=1
    if [ $formatter = 1 ]; then
      clang-format -style=file <"$source" >"$scratch/formatted"
      diff "$source" "$scratch/formatted" >"$scratch/diff" ||
        { echo "$file: clang-format would change:"; bad=1; }
      head -n 20 "$scratch/diff"
    fi
  done
  measure "$here/nbdserve.c" >"$scratch/figures"
  n=$(($(sed -n 's/^code //p' "$scratch/figures") -
    $(sed -n 's/^lone //p' "$scratch/figures")))
  # The goal is 6500: until it is met, not one line more than there is now
  [ $n -le 8854 ] || { echo "nbdserve.c: $n lines of code, over 8854"; bad=1; }
  return $bad
}
case ${1-} in
  --figures | --lint)
    scratch=$(mktemp -d) || exit
    trap 'rm -rf "$scratch"' EXIT
    if [ "$1" = --lint ]; then lint; else figures "${2:-$here/nbdserve.c}"; fi
    exit
    ;;
esac

# ==== make cov ===============================================================

# A compiler whose programs count which lines run.  Each has files of its own in
# the directory, wherever it is built and whatever name it gets: the tests build
# nbdserve.c under many switches, and remove what they built.  _exit() leaves no
# counts by itself; a process that cannot write them all leaves none, for half
# of them would cost those of all others; what is linked by others cannot count.
cov_cc() { # directory
  cat >"$1/exit.h" <<END
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#define _FILE_OFFSET_BITS 64
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>
static void cov_leave(int status, void *unused) {
  struct rlimit limit;
  (void)unused;
  if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur == RLIM_INFINITY &&
      !access("$1", W_OK))
    return;
  fflush(NULL);
  _exit(status);
}
__attribute__((constructor)) static void cov_enter(void) {
  on_exit(cov_leave, NULL);
}
void __gcov_dump(void);
#define _exit(status) (__gcov_dump(), _exit(status))
END
  cat <<END
#!/bin/sh
case " \$* " in
  *' -c '* | *' -shared '*) ;;
  *) set -- -O0 --coverage -include '$1/exit.h' -dumpdir '$1/'\$\$- "\$@" ;;
esac
exec gcc "\$@"
END
}
# The coverage, and the longest runs of lines that no program ran, with the
# function that each begins in.  A line counts as run if it is in any program;
# what is a line is not asked of those that are built with -O2.  What was killed
# by a signal has left no counts.
cov_report() { # directory
  (
    cd "$1" || exit
    for counts in *.gcda; do gcov -t "$counts" 2>/dev/null; done
  ) | awk '
    /^ +-: +0:Source:/ { ours = /[:\/]nbdserve\.c$/; next }
    !ours { next }
    /^ +-: +0:Data:/ { fast = /-(simulator|mutate)\.gcda$/; next }
    {
      count = $0
      sub(/:.*/, "", count)
      gsub(/[ *]/, "", count)
      line = substr($0, index($0, ":") + 1)
      n = line + 0
      sub(/^[^:]*:/, "", line)
      if (n == 0 || count == "-") next
      if (!fast) known[n] = 1
      if (count !~ /[#=]/) ran[n] = 1
    }
    END { for (n in known) print n, (n in ran) + 0 }' | sort -n |
    awk '
    function close_run() {
      if (size) printf "%5d %5d-%-5d %s\n", size, first, last, at
      size = 0
    }
    NR == FNR {
      if (/^[a-z].*[a-z0-9_]\(.*[^;]$/) {
        name = $0
        sub(/\(.*/, "", name)
        sub(/.*[ *]/, "", name)
      }
      if (/^\/\* ==== \[/) section = $3
      where[FNR] = section " " name
      next
    }
    {
      of++
      split(where[$1], word, " ")
      lines[word[1]]++
      ran += $2
      if ($2) { in_section[word[1]]++; close_run(); next }
      if (size && where[$1] != at) close_run()
      if (!size++) { first = $1; at = where[$1] }
      last = $1
    }
    END {
      close_run()
      for (s in lines)
        printf "    0 %-14s %5.1f %% of %d\n", s,
          100 * in_section[s] / lines[s], lines[s]
      printf "    0 all %14.1f %% of %d lines\n", of ? 100 * ran / of : 0, of
    }' "$here/nbdserve.c" - | sort -k1,1nr -k2,2n
}
case ${1-}/${2-} in
  --cov/cc) cov_cc "${3:?}"; exit ;;
  --cov/report) cov_report "${3:?}"; exit ;;
esac

# ==== make install ===========================================================
# What --help and the header say, in the forms that a system wants.

version() {
  sed -n 's/^#define NBDSERVE_VERSION "\(.*\)"/\1/p' "$here/nbdserve.h"
}
# Lines that are text for roff: no dot or quote begins one, no - is a hyphen
roff='function roff(s) { gsub(/\\/, "\\e", s); gsub(/-/, "\\-", s)
  return s ~ /^[.'"'"']/ ? "\\&" s : s }'
man_1() { # of the command
  "$NBDSERVE" --help | awk -v version="$(version)" "$roff"'
    BEGIN {
      print ".TH NBDSERVE 1 \"\" \"nbdserve " version "\"\n.SH NAME"
      print "nbdserve \\- a complete NBD server\n.SH SYNOPSIS\n.nf"
    }
    /^usage: / { print roff(substr($0, 8)); next }
    NR == 2 { print roff(substr($0, 8)) "\n.fi\n.SH DESCRIPTION"; next }
    /^  (-.,|   ) --/ {
      if (!options++) print ".SH OPTIONS"
      print ".TP\n" roff(substr($0, 3, 26)) "\n" roff(substr($0, 29)); next
    }
    /^Commands on stores/ { print ".SH COMMANDS" }
    /^  [a-z]/ {
      print ".TP\n" roff(substr($0, 3, 34)) "\n" roff(substr($0, 37)); next
    }
    /^Numbers take/ { print ".SH NOTES" }
    $0 { print roff($0) }
    END { print ".SH SEE ALSO\n.BR nbdinfo (1),\n.BR nbdserve (3)" }'
}
man_3() { # of the library: the header, a paragraph for each comment
  awk -v version="$(version)" "$roff"'
    BEGIN {
      print ".TH NBDSERVE 3 \"\" \"nbdserve " version "\"\n.SH NAME"
      print "nbdserve \\- serve block devices over NBD from your own program"
      print ".SH SYNOPSIS\n.nf\n#include <nbdserve.h>\n.fi\n.SH DESCRIPTION"
    }
    /^\/\* ---- The format of a store/ { exit }
    /^#(ifndef|ifdef|include|endif)|^extern|^}$|SPDX|^$/ { next }
    /^\/\* ---- / {
      gsub(/^\/\* -+ | -*( \*\/)?$/, "")
      print ".SS \"" roff($0) "\""
      text = 0
      next
    }
    /^ *\/\*/ && !code { text = 1; print ".PP" }
    text {
      last = /\*\/$/
      gsub(/^ *\/?\*+ ?| *\*\/$/, "")
      if ($0) print roff($0); else if (!last) print ".PP"
      if (last) text = 0
      next
    }
    { if (!code) print ".nf"; code = 1; print roff($0) }
    code && /[;}]$|^#define/ { code = 0; print ".fi" }' "$here/nbdserve.h"
}
pkg_config() {
  printf '%s\n' "prefix=${PREFIX:-/usr/local}" \
    "libdir=${LIBDIR:-/usr/local/lib}" \
    "includedir=${INCLUDEDIR:-/usr/local/include}" '' 'Name: nbdserve' \
    'Description: serve block devices over NBD' "Version: $(version)" \
    'Cflags: -I${includedir}' 'Libs: -L${libdir} -lnbdserve -pthread'
}
completion() { # for bash
  "$NBDSERVE" --help | awk '
    match($0, /--[a-z-]+/) && /^  / {
      options = options " " substr($0, RSTART, RLENGTH)
    }
    /^  [a-z]/ { commands = commands " " $1 }
    END {
      print "_nbdserve() {\n  local words=\"" options "\""
      print "  [ \"$COMP_CWORD\" != 1 ] || words+=\"" commands "\""
      print "  COMPREPLY=($(compgen -W \"$words\" -- \"$2\"))\n}"
      print "complete -o default -F _nbdserve nbdserve"
    }'
}
if [ "${1-}" = --package ]; then
  case ${2-} in
    nbdserve.1) man_1 ;;
    nbdserve.3) man_3 ;;
    nbdserve.pc) pkg_config ;;
    nbdserve.bash) completion ;;
    *) exit 2 ;;
  esac
  exit
fi

# ==== Which tests ============================================================

# The tests that take longest, in milliseconds.  --shard deals them out first;
# every other test counts as 60.
slow_tests() {
  cat <<'END'
3300 testProgressIsShownOnATerminal
6100 testPullsCommandIsToldToEndAfterFiveSeconds
3500 testPullKilledAgainAndAgainEndsWithTheId
3000 testPullThatIsCutOffAnywhereIsGoneOnWith
3900 testPullByAServerEndsWithItsCommandOrTheServer
3000 testPullOfAnIncrementMovesWhatDiffers
2800 testPullOnAFullDiskLeavesRoomForOthers
4100 testWhatIsBelowLostPagesIsPulledByItsId
3400 testRepairMendsPagesAndBlocksBesideClients
2500 testGcRemovesAPartialThatIsAWeekOld
2100 testRepairGoesOnWhenWhatItMendsIsRemoved
1600 testPullsSealsCheckpointsAndVerifySideBySide
2500 testPullThatIsEndedIsGoneOnWith
4000 testStoreOnAFullExt4
4000 testStoreOnAFullExt3
6000 testStoreOnAFullXfs
4000 testStoreOnAFullBtrfs
3000 testStoreOnAFullTmpfs
4500 testKillLosesNothingThatWasAcknowledged
5500 testStoreThatIsInUseForAMomentIsWaitedFor
5300 testACommandWaitsForNoOther
3100 testExportDoesNotOverwriteAStore
2400 testExportLeavesNoHalfFile
2100 testOutputThatNobodyTakesEndsACommand
1200 testMessageThatNobodyTakesIsDropped
1100 testReaderThatHasGoneEndsACommand
1100 testTERMEndsAnExportAndLeavesNoHalfFile
11000 testEverySystemCallMayFailOnce
5500 testTERMEndsAClientOnStdinThatNeverReads
2500 testASessionWithAStoreThatLacksMemoryOnceGoesOn
2700 testWhoStallsIsDroppedAndWhoIsIdleIsNot
5100 testStoppingLeavesAloneWhoReadsNothing
9000 testNoPowerCutLosesWhatWasFlushed
12000 testMutatedStoresAreRefusedOrSound
8000 testWhichDestroyedSectorCostsWhat
4000 testOneBadCopyOfAPageIsMendedInSilence
2500 testSlotsThatRunningCountsAreThoseThatOpeningFinds
2200 testControlSocketOutlivesTheLackOfDescriptors
2000 testShortOfDescriptorsItRecovers
1000 testCopiesThatDifferALittleTakeALittle
1800 testTERMEndsACommandAndLeavesNothingHalf
1700 testTERMOfTheServerEndsItsCommandsToo
1300 testFlushCoversWhatWasWrittenWhileAnotherRan
1200 testLimitsAndAllocatorMayBeSet
1200 testHandshakeHasADeadline
1200 testReadmeCommandsRun
1200 testStoreCommandsPrintJsonThatParses
1200 testStoresOfAnotherMachineAreTheSame
1200 testSerialBackendIsCalledOneAtATime
1100 testStallEndsWhoStopsHalfway
1100 testForkReturnsWhenListening
1100 testAClientThatEndsHoldsNoSlot
1100 testManyPipelinedRequestsOverManyConnections
1000 testForgedStoresAreRefusedOrSound
1000 testReadmeCExamplesCompileAndServe
1000 testUSR1DoesNotPostponeTheIdleExit
2700 testIdleTimeBeginsWhenTheLastClientHasLeft
1000 testIdleExitEndsItWithoutClients
1000 testHeaderServesCxx98
800 testNoReplyComesInsideTheDataOfALoneRead
600 testCommandOfAClientThatIsGoneIsNotGoneOnWith
600 testBadInputNeitherHurtsOthersNorLeaks
600 testARequestHasItsTimeInTotal
600 testDamagedDigestIsNotSealedIntoAnId
500 testDelayedRequestsWaitTogether
500 testPipelinedOptionsDoNotProlongTheHandshake
500 testFioVerifiesWhatItWroteToAVolume
500 testTwoHundredClonesAreWrittenThroughOneServer
500 testBothCopiesOfALeafWrongCostItsBlocksOnly
400 testOneOfThreeServersGetsAStaleSocket
400 testFaultsHitTheirShareOfTheirCommand
400 testFioVerifiesWhatItWrote
400 testEachYesOfTheProtocolTableHasATest
400 testInitAndForeignFiles
300 testAThousandConnectionsInTurn
300 testWhatComesAfterTheEndIsNotTakenForEver
300 testInitTakesASizeWhereTheEnvironmentNamesTheStore
300 testOtherChildrenThatExitDoNotEndIt
300 testGcGivesSpaceBack
300 testFullStoreIsENOSPCForTheWriteOnly
300 testNbdcopyMovesAnImageInAndOutOfAStore
300 testNbdcopyMovesAnImageInAndOut
300 testExportKeepsHoles
300 testFreeEndsTheClientsThatAreLeft
300 testWrongNamesAreRefused
300 testAClientThatNeverReadsLeavesMemoryForOthers
300 testDamagedSuperblocksAreMendedFromTheOther
300 testWrongStoreCommandsExit2
300 testAClientThatNeverReadsHarmsNobody
300 testManyPipelinedRequestsToMemory
END
}

# What `quick` runs: of each group what finds most in little time
quick_tests() {
  cat <<'END'
testReadmeNamesEverySwitch testInterruptedAndShortCallsAreFinished
testRefusedFallocateIsReplacedByWrites testThreadsRefusedIsNoHarm
testSizesTakeSuffixes testNamesAreUtf8 testUriEscapesTheExportName
testLibraryEscapesUris testSha256OfTheStandardsExamples
testSha256IsTheSameByAllWays testUnknownFlagsAreEINVAL
testFlagsOfOtherCommandsAreEINVAL testReadBeyondTheEndIsEINVAL
testReadOnlyRefusesWritesWithEPERM testErrorsAreMappedToNbds
testVanishingClientRaisesNoSIGPIPE testNobodyWaitsForNagle
testEndOfInputInTheMiddleFinishesWhatCameBefore
testAClientThatNeverReadsHarmsNobody testEachNameReachesItsExport
testBackendSeesOnlySoundRequests testFuaIsAFlushUnlessNative
testMissingMembersAreEmulatedOrNotOffered testExportsAreFoundOnDemand
testExtentsAreMergedAndCut testWhatIsTakenAwayIsGoneAndTheRestWorks
testFlushesOfManyConnections testHelloIsFixedNewstyleWithNoZeroes
testBadOptionMagicCloses testUnknownOptionIsUnsupAndItsDataSkipped
testMalformedInfoAndGoAreInvalid testNamesOf4096BytesWorkAndLongerOnesDoNot
testInfoAndGoGiveTheSameAnswers testListNamesAllExportsAndDescriptions
testBlockSizesNotAskedForAreRequired
testExtendedHeadersAreAcknowledgedAndMayBeAskedForAgain
testEachSetReplacesTheSelection testBadRequestMagicCloses
testUnknownCommandIsEINVALAndInStep testLongReadsAreSeveralChunks
testReadsAreAnsweredWithData testReadsOfNothingButZeroesAreHoles
testExtendedStatusIsOf64Bits testOffsetsNear2To64DoNotWrap
testWriteOverTheMaximumIsEINVALAndInStep testCookiesAreOpaqueAndMayRepeat
testRequestsBeforeADisconnectAreAnswered testManyPipelinedRequestsToMemory
testNoReplyComesInsideTheDataOfALongRead testSlowFlushTrimOrReadHoldsNoReadsUp
testMixedRequestsGetTheirOneAnswer testOperationsThatLieAreEIO
testLeavingClientGetsItsAnswers testMemoryRefusedIsNoCrash
testReadOnlyFileIsServedWithR testSecondServerOfAFileExits4
testSliceIsServedAlone testTemporaryWritesLeaveTheTargetAlone
testWritesAreInTheFile testWriteZeroesReadsAsZeroes testTrimFreesSpace
testBlockStatusTellsDataFromHoles testDurableWritesSurviveKILL
testFailedSyncFailsAllLaterWrites testDiskFullIsENOSPCAndPasses
testWritersReadersAndChangesOfAStoreTogether testSameDataIsStoredOnce
testSnapshotsKeepWhatWasAndRollbackBringsItBack testIdsAreOfTheContentAlone
testDamagedDataIsFoundAndIsAnErrorOfItsBlockOnly testDamagedLogIsReadOnly
testDurableWritesToAVolumeSurviveKILL testStaleSocketIsReplaced
testLiveSocketIsNotReplaced testPortZeroPrintsTheChosenPort
testOnceEndsAfterTheLastClient testConnectionsOverTheLimitWaitForASlot
testClientsThatStopHalfwayHarmNobody testAcknowledgedWritesSurviveTERM
testStopAndWakeEndRun testStopAnswersWhatIsInFlight
testUsageErrorsExit2WithAMessage testUnknownOptionsAreNamed
testRunPassesTheStatusOn testCommandAfterDashesGetsTheUri
testForkReportsWhatFails testSignalsEndItInOrder testPassedSocketIsServed
testStatsAreWrittenAtExitAndOnUSR1 testFilesComeOutOfAStoreAsTheyWentIn
testCommandsOnAServedStoreAreDoneByTheServer testDryRunChangesNothing
testMapOfSectionsEqualsTheBanners testMapOfGroupsEqualsTheBanners
testListsNameTestsThatThereAre testShardsTogetherAreAll
testReadmeHasTheHelpText testNbdinfoDescribesIt testNbdcopyMovesAnImageInAndOut
testQemuIoWritesZeroesAndDiscards
END
}

# Prints every test with its group: "@cas testName"
all_tests() {
  awk '
    /^# ==== \[/ { group = $0; gsub(/.*\(|\).*/, "", group) }
    /^test[A-Z][A-Za-z0-9]*\(\)/ { sub(/\(.*/, ""); print group, $0 }
    /^\. shunit2/ { exit }' "$self"
}

# Prints the tests that the words mean (all without words), in the order of this
# file, and of these only those of shard I/N.  The longest test goes first, each
# to the shard that has the least to do.
choose() { # I/N word...
  shard=$1
  shift
  {
    slow_tests
    quick_tests | tr ' ' '\n' | sed 's/^/quick /'
    all_tests
  } | awk -v words="$*" -v shard="$shard" '
    BEGIN {
      n = split(words, word, " ")
      split(shard, part, "/")
    }
    /^[0-9]/ { weight[$2] = $1; next }
    $1 == "quick" { quick[$2] = 1; next }
    {
      wanted = n == 0
      for (i = 1; i <= n; i++)
        if (word[i] == $1 || word[i] == $2 ||
          (word[i] == "quick" && $2 in quick)) wanted = known[word[i]] = 1
      if (wanted) test[++count] = $2
    }
    END {
      for (i = 1; i <= n; i++) if (!(word[i] in known)) {
        print "no such test or group: " word[i] >"/dev/stderr"
        exit 2
      }
      for (k = 1; k <= count; k++) {
        longest = 0
        for (i = 1; i <= count; i++) {
          if (i in to) continue
          ms = test[i] in weight ? weight[test[i]] : 60
          if (!longest || ms > most) { longest = i; most = ms }
        }
        least = 1
        for (s = 2; s <= part[2]; s++) if (load[s] < load[least]) least = s
        load[least] += most
        to[longest] = least
      }
      for (i = 1; i <= count; i++) if (to[i] == part[1]) print test[i]
    }'
}

usage() {
  sed -n 's/^#   \(.\/test\.sh.*\)/\1/p' "$self" >&2
  exit 2
}
if [ -z "${inside_count-}" ] && [ "${1-}" != --bench ]; then
  shard=1/1 list='' words=''
  while [ $# -gt 0 ]; do
    case $1 in
      --) ;;
      --list) list=1 ;;
      --shard)
        case ${2-} in
          [1-9]/[1-9]) shard=$2 ;;
          *) usage ;;
        esac
        [ "${shard%/*}" -le "${shard#*/}" ] || usage
        shift
        ;;
      quick | @[a-z]* | test[A-Z]*) words="$words $1" ;;
      *) usage ;;
    esac
    shift
  done
  # shellcheck disable=SC2086
  SELECTED=$(choose $shard $words) || exit 2
  if [ -n "$list" ]; then
    [ -z "$SELECTED" ] || printf '%s\n' "$SELECTED"
    exit
  fi
  SEED=${SEED:-$(od -An -N2 -tu2 /dev/urandom | tr -d ' ')}
fi

# ==== make bench =============================================================

# A table of requests a second against the servers that are installed: they
# stay up and take turns, each on a copy of one image; medians of $ROUNDS.  Our
# store, on the same data, is compared with our flat file.  Before each sample
# the image is read, or for cold rows thrown out of memory.
bench() {
  W=$(mktemp -d "${TMPDIR:-/tmp}/bench.XXXXXX") || exit
  trap 'kill $jobs $(cat "$W"/*.pid 2>/dev/null) 2>/dev/null; rm -rf "$W"' EXIT
  trap 'exit 1' INT TERM
  jobs=''
  emit bench >"$W/bench.c"
  $CC -O2 -o "$W/bench" "$W/bench.c" -lpthread || exit
  dd if=/dev/urandom of="$W/image" bs=1M count=256 2>/dev/null
  # Where a server is, what its only export is called, and its image
  at() { [ "$kind" = tcp ] && cat "$W/$1.port" || echo "$W/$1.s"; }
  export_of() { [ "$1" != nbd-server ] || echo x; }
  img() { [ "$1" = store ] && echo "$W/pool" || echo "$W/$1.img"; }
  ask() { # name, what the program takes behind socket and export
    asked=$1
    shift
    timeout 30 "$W/bench" "$(at "$asked")" "$(export_of "$asked")" "$@"
  }
  start() { # name, command...: adds it to $names
    name=$1
    shift
    command -v "$1" >/dev/null || { echo "SKIP $1: not installed"; return; }
    [ "$name" = store ] || [ -e "$W/$name.img" ] ||
      cp "$W/image" "$W/$name.img"
    "$@" >/dev/null 2>&1 &
    jobs="$jobs $!" names="$names $name"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      ask "$name" read 512 1 1 1 >/dev/null 2>&1 && return
      sleep 0.2
    done
    echo "$name does not start"
    exit 1
  }
  kind=warm names=''
  start nbdserve "$NBDSERVE" -U "$W/nbdserve.s" "$W/nbdserve.img"
  start nbdkit nbdkit -f -U "$W/nbdkit.s" file "$W/nbdkit.img"
  start qemu-nbd qemu-nbd -t -e 16 -f raw -k "$W/qemu-nbd.s" "$W/qemu-nbd.img"
  printf '[generic]\nunixsock=%s\nport=20809\nlistenaddr=127.0.0.1\n' \
    "$W/nbd-server.s" >"$W/conf"
  printf '[x]\nexportname=%s\n' "$W/nbd-server.img" >>"$W/conf"
  start nbd-server nbd-server -C "$W/conf" -p "$W/d.pid" # a daemon
  warm=$names names=''
  "$NBDSERVE" init "$W/pool" && "$NBDSERVE" import "$W/pool::v" "$W/image"
  start store "$NBDSERVE" -U "$W/store.s" "$W/pool::v"
  store='store nbdserve' kind=tcp names=''
  for name in nbdserve:20810 nbdkit:20811 qemu-nbd:20812; do
    echo "127.0.0.1:${name#*:}" >"$W/${name%:*}.port"
  done
  cp "$W/image" "$W/tcp.img"
  start nbdserve "$NBDSERVE" -p 20810 "$W/tcp.img"
  start nbdkit nbdkit -f -p 20811 -i 127.0.0.1 file "$W/tcp.img"
  start qemu-nbd qemu-nbd -t -e 16 -f raw -b 127.0.0.1 -p 20812 "$W/tcp.img"
  tcp=$names
  printf '%-21s%10s%9s%9s%11s%6s\n' 'requests a second' \
    nbdserve nbdkit qemu-nbd nbd-server best
  while read -r title kind command bytes depth connections; do
    case $kind in
      tcp) names=$tcp ;;
      store) names=$store ;;
      *) names=$warm ;;
    esac
    for _ in $(seq "${ROUNDS:-5}"); do
      for name in $names; do
        if [ "$kind" = cold ]; then
          dd of="$(img "$name")" oflag=nocache conv=notrunc,fdatasync count=0 \
            2>/dev/null </dev/null
        else
          cat "$(img "$name")" >/dev/null
        fi
        ask "$name" "$command" "$bytes" "$depth" "$connections" 300 \
          >>"$W/$name.out" || { echo "with $name"; exit 1; }
      done
    done
    printf '%-21s' "$title"
    for name in $names; do
      sort -n "$W/$name.out" | sed -n "$(((${ROUNDS:-5} + 1) / 2))p"
      rm "$W/$name.out"
    done | awk '
      { v[NR] = $1 }
      NR > 1 && $1 > best { best = $1 }
      END {
        printf "%10s%9s%9s%11s", v[1], v[2], v[3], v[4]
        for (i = 1; best && i <= 10 * v[1] / best && i < 20; i++)
          bar = bar (i == 10 ? "|" : "=")
        if (best) printf "%6.2f %s", v[1] / best, bar
        print ""
      }'
  done <<END
4K-read,q16 warm read 4096 16 1
4K-read,q64 warm read 4096 64 1
4K-read,q16,4-clients warm read 4096 16 4
4K-write,q64 warm write 4096 64 1
64K-read,q16 warm read 65536 16 1
64K-write,q16 warm write 65536 16 1
1M-read,q8 warm sequential 1048576 8 1
1M-write,q8 warm write 1048576 8 1
4K-write+flush,q2 warm flush 4096 2 1
cold:4K-read,q16 cold read 4096 16 1
cold:1M-read,q8 cold sequential 1048576 8 1
TCP:4K-read,q16 tcp read 4096 16 1
TCP:64K-read,q16 tcp read 65536 16 1
TCP:1M-read,q8 tcp sequential 1048576 8 1
store:4K-read,q64 store read 4096 64 1
store:4K-write,q64 store write 4096 64 1
store:1M-read,q8 store sequential 1048576 8 1
store:1M-write,q8 store write 1048576 8 1
store:write+flush,q2 store flush 4096 2 1
END
  echo 'q: requests in flight.  best: ours divided by the best of the others.'
  echo 'store: ours in the first column, our flat file in the second.'
}
if [ "${1-}" = --bench ]; then
  bench
  exit
fi

# ==== The report =============================================================

# Milliseconds; whole seconds where date knows no %N
clock() {
  case $(date +%N) in
    *[!0-9]*) echo "$(date +%s)000" ;;
    *) echo "$(($(date +%s%N) / 1000000))" ;;
  esac
}

# Seconds for each group and the slowest tests, from lines "MS testName"
durations() {
  {
    all_tests
    cat
  } | awk '
    /^@/ { group[$2] = $1; next }
    {
      g = group[$2]
      if (!(g in sum)) order[++groups] = g
      sum[g] += $1
      ms[$2] = $1
    }
    END {
      line = "seconds:"
      for (i = 1; i <= groups; i++) {
        item = sprintf(" %s %.1f", order[i], sum[order[i]] / 1000)
        if (length(line item) > 79) { print line; line = "        " }
        line = line item
      }
      print line
      for (i = 1; i <= 10; i++) {
        longest = ""
        for (t in ms) if (longest == "" || ms[t] > ms[longest]) longest = t
        if (longest == "") break
        printf "%7.1f %s\n", ms[longest] / 1000, longest
        delete ms[longest]
      }
    }'
}

# Copies shunit2's report, adds what took how long, how to repeat what failed
# and, as the last line, the number of tests
count() {
  name='' passed=0 failed=0 skipped=0 bad=0 skip=0 status=1 times='' again=''
  settle() {
    now=$(clock)
    if [ -z "$name" ]; then from=$now; return; fi
    if [ $bad = 1 ]; then failed=$((failed + 1)) again="$again $name"
    elif [ $skip = 1 ]; then skipped=$((skipped + 1))
    else passed=$((passed + 1)); fi
    times="$times$((now - from)) $name
"
    bad=0 skip=0 from=$now
  }
  while IFS= read -r line; do
    case $line in
      test[A-Z]*) settle; name=$line ;;
      ASSERT:* | shunit2:*) bad=1 ;;
      'SKIP '*) line="SKIP $name: ${line#SKIP }" skip=1 ;;
      '@ended '*) status=${line#@ended }; continue ;;
    esac
    printf '%s\n' "$line"
  done
  if [ "$status" != 0 ] && [ $((failed + bad)) = 0 ]; then
    echo "the tests ended early with status $status"
    bad=1
  fi
  if [ -z "$name" ]; then name=none bad=1; fi
  settle
  if [ $((passed + failed + skipped)) -gt 1 ]; then
    printf %s "$times" | durations
  fi
  [ -z "$again" ] || echo "to repeat: SEED=$SEED ./test.sh$again"
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ]
}
if [ -z "${inside_count-}" ]; then
  inside_count=1
  # shellcheck disable=SC1090
  { (. "$self"); echo "@ended $?"; } 2>&1 | count
  exit
fi

# ==== Helpers ================================================================

case $NBDSERVE in */*) ;; *) NBDSERVE=$(command -v "$NBDSERVE") ;; esac
case $NBDSERVE in /*) ;; *) NBDSERVE=$PWD/$NBDSERVE ;; esac
BARE=$NBDSERVE # what a test has put in its place ends with the test
CFLAGS=${CFLAGS--O1} LDLIBS=${LDLIBS--lpthread} HOST_CC=${HOST_CC-$CC}
EMULATOR=${EMULATOR-}
SWITCH=${SWITCH-} SLACK=1024 # KiB that a server may grow under bad input
LIMIT=300                    # seconds for a C program
[ -z "${SANITIZER-}" ] || SLACK=1000000
LC_ALL=C SHUNIT_COLOR=none
export LC_ALL CC SEED
unset XDG_RUNTIME_DIR LISTEN_FDS LISTEN_PID

oneTimeSetUp() {
  W=$SHUNIT_TMPDIR
  CORPUS=${CORPUS:-$W/corpus}
  mkdir -p "$CORPUS"
  echo "SEED=$SEED"
  NTEST=0 NTALK=0 T=
  [ -x "$NBDSERVE" ] || make -C "$here" CC="$CC" >&2
  [ -x "$NBDSERVE" ] || return
  if [ -n "$EMULATOR" ]; then
    emulated "$EMULATOR" "$NBDSERVE" >"$W/nbdserve"
    chmod +x "$W/nbdserve"
    NBDSERVE=$W/nbdserve BARE=$W/nbdserve
  fi
  bytes 00000003 "$(opt ABORT)" >"$W/abort"
}

# A script that is such a program of another machine
emulated() { # emulator program
  printf '#!/bin/sh\nexec %s %s "$@"\n' "$1" "$2"
}

# Each test: an own directory $T with an image of 64 KiB
setUp() {
  NTEST=$((NTEST + 1)) NSERVE=0 JOBS='' ARGS='' LOG='^$' NBDSERVE=$BARE
  : >"$W/noises"
  SIZE=65536 FLAGS=0d6d RO=0503 BLOCK='' INFOS='' IN=/dev/null
  [ "$SWITCH" != NO_THREADS ] || FLAGS=0c6d RO=0403 # no CAN_MULTI_CONN
  T=$W/$NTEST DISK=$W/$NTEST/disk
  mkdir "$T" && echo nbdserve >"$DISK" && truncate -s 64K "$DISK"
}

# Servers end in order, and without messages except those the test allowed
tearDown() {
  for JOB in $JOBS; do
    PID=${JOB#*:} JOB=${JOB%:*}
    stop TERM
    assertEquals 'exit status of a server' 0 "$STATUS"
  done
  JOBS=''
  if [ -n "$T" ] && [ -s "$T/err" ]; then
    assertEquals 'messages of a server' '' \
      "$(grep -Ev "$LOG" "$T/err" | head -n 5)"
  fi
  rm -rf "$T"
  T=''
}

skip() { # reason
  echo "SKIP $*"
  startSkipping
}

# For what takes its time, and depends on no compiler
unhurried() {
  case $CC in clang | tcc | musl-gcc) ;; *) return 0 ;; esac
  skip 'it takes its time, whatever compiler there is'
  return 1
}
# Is this not the build that users have first, in which each test goes all the
# way?  What the others add is found by a part of it.
is_variant() {
  case $SWITCH${SANITIZER-},$CC in
    ,clang | ,tcc | ,musl-gcc | ?*,*) return 0 ;;
  esac
  return 1
}
unless() { # switch
  [ "$SWITCH" != "$1" ] || { skip "built with NBDSERVE_$1"; return 1; }
}
pulls() { unless NO_CAS && unless NO_CLIENT; }

# What a test cannot do without: a tool, a /path, the rights of root, a terminal
# from script(1), or a loopback interface that is up
needs() {
  for what; do
    case $what in
      /*) [ -e "$what" ] || { skip "no $what here"; return 1; } ;;
      root) [ "$(id -u)" = 0 ] || { skip 'not run by root'; return 1; } ;;
      terminal)
        script -qec true /dev/null </dev/null >/dev/null 2>&1 ||
          { skip 'no terminal from script'; return 1; }
        ;;
      loopback)
        case $(cat /sys/class/net/lo/flags 2>/dev/null) in
          *[13579bdf] | '') ;;
          *) skip 'the loopback interface is down'; return 1 ;;
        esac
        ;;
      *) command -v "$what" >/dev/null ||
        { skip "no $what here"; return 1; } ;;
    esac
  done
}

# The C program of that name, built when first needed: $W/NAME.  Those that
# compute more than they wait are worth -O2.
build() {
  if [ ! -e "$W/$1.log" ]; then
    emit "$1" >"$W/$1.c"
    cc=$CC fast=
    case $1 in
      client) cc=$HOST_CC ;;
      simulator | mutate) fast=-O2 ;;
    esac
    # shellcheck disable=SC2086
    $cc $CFLAGS $fast -I"$here" -o "$W/$1" "$W/$1.c" $LDLIBS >"$W/$1.log" 2>&1
  fi
  [ -x "$W/$1" ] || { fail "$1: $(head -n 5 "$W/$1.log")"; return 1; }
}

# A command that must end with status 0; its output goes to $T/log
does() {
  timeout $LIMIT "$@" >"$T/log" 2>&1
  status=$?
  assertEquals "$(basename "$1") $2: $(tail -n 5 "$T/log")" 0 $status
}
client() { ! build client || does "$W/client" "$@"; }
# shellcheck disable=SC2086
unit() { ! build unit || does $EMULATOR "$W/unit" "$@" "$T"; }
# shellcheck disable=SC2086
fault() { ! build fault || does $EMULATOR "$W/fault" "$@"; }

# One run of the program, with a client that comes on stdin and leaves:
# STATUS, $T/out, $T/err
run() {
  timeout 20 "$NBDSERVE" "$@" <"$W/abort" >"$T/out" 2>>"$T/err"
  STATUS=$?
}

# Asserts that there are messages, all in the form of nbdserve's, one of them
# matching the pattern; clears them
says() {
  assertTrue "says '$1': $(cat "$T/err")" "grep -Eq -e '$1' '$T/err'"
  assertEquals 'form of messages' '' \
    "$(grep -Ev '^(nbdserve: |\{"error":")' "$T/err")"
  : >"$T/err"
}

# The program in the background, from $IN to $OUT: JOB, which tells its status,
# and in the end PID, which gets its signals (timeout might not know it yet)
spawn() {
  NSERVE=$((NSERVE + 1))
  timeout -s KILL 100 sh -c 'echo $$ >"$0"; exec "$@"' "$T/pid$NSERVE" \
    "$NBDSERVE" "$@" <"$IN" >"$OUT" 2>>"$T/err" &
  JOB=$!
}
spawned() {
  PID=$(cat "$T/pid$NSERVE")
  JOBS="$JOBS $JOB:$PID"
}
# A server in the background, and the line that it prints when ready: URI
start() {
  OUT=$T/uri$NSERVE
  mkfifo "$OUT"
  spawn "$@"
  URI=$(timeout 20 head -n 1 "$OUT")
  spawned
  assertNotNull "no URI from $*: $(cat "$T/err")" "$URI"
}
serve() {
  SOCK=$T/s$((NSERVE + 1))
  start -U "$SOCK" "$@"
}
stop() { # signal; for the server JOB, PID: STATUS
  kill "-$1" "$PID" 2>/dev/null
  wait "$JOB" 2>/dev/null
  STATUS=$?
  JOBS=$(echo " $JOBS " | sed "s/ $JOB:$PID / /")
}
# Waits up to 10 s for a condition that another process makes true
await() {
  n=0
  until eval "$1"; do
    n=$((n + 1))
    [ $n -le 200 ] || { fail "waited in vain for: $1"; return 1; }
    sleep 0.05
  done
}

# ---- Transcripts: bytes in, bytes out ---------------------------------------

# As bytes: words of hex digits, requests (see req), @N for N zero bytes
bytes() {
  for word; do
    IFS=,
    # shellcheck disable=SC2086
    case $word in
      *,*) req $word ;;
      *) echo "$word" ;;
    esac
    echo
  done | awk '
    function nibble(i) {
      return index("123456789abcdef", substr($0, i, 1))
    }
    /^@/ { print; next }
    {
      s = ""
      gsub(/ /, "")
      for (i = 1; i < length($0); i += 2)
        s = s sprintf("\\%03o", nibble(i) * 16 + nibble(i + 1))
      print s
    }' | while read -r word; do
    # shellcheck disable=SC2059
    case $word in
      @*) head -c "${word#@}" /dev/zero ;;
      *) printf "$word" ;;
    esac
  done
}
hex() { od -An -v -tx1 | tr -d ' \n'; }
at() { od -An -v -tx1 -j "$1" -N "$2" "$DISK" | tr -d ' \n'; } # of the image
of() { printf %s "$1" | hex; }
zeroes() { printf "%0$(($1 * 2))d" 0; }

EXPORT_NAME=1 ABORT=2 LIST=3 PEEK=4 STARTTLS=5 INFO=6 GO=7 STRUCTURED=8
LIST_META=9 SET_META=10 EXTENDED=11
READ=0 WRITE=1 DISC=2 FLUSH=3 TRIM=4 CACHE=5 ZEROES=6 STATUS_OF=7
FUA=0x10000 NO_HOLE=0x20000 DF=0x40000 REQ_ONE=0x80000 FAST=0x100000
PAYLOAD=0x200000

opt() { # number [payload]
  printf '49484156454f5054%08x%08x%s' $(($1)) $((${#2} / 2)) "${2-}"
}
ask() { # INFO or GO, name in hex, information type...
  opt=$1 name=${2-}
  [ $# -lt 2 ] || shift
  shift
  # shellcheck disable=SC2046
  opt "$opt" "$(printf '%08x%s%04x' $((${#name} / 2)) "$name" $#
    [ $# = 0 ] || printf '%04x' "$@")"
}
meta() { # LIST_META or SET_META, name in hex, query...
  opt=$1 name=$2
  shift 2
  opt "$opt" "$(printf '%08x%s%08x' $((${#name} / 2)) "$name" $#
    for query; do printf '%08x%s' ${#query} "$(of "$query")"; done)"
}
# COMMAND[+FLAG...],cookie,offset,length is such a request for talk and bytes.
# The upper half of a READ's cookie is its length, which tells
# decode how much data a simple reply carries.
req() { # COMMAND[+FLAG...] cookie offset length
  if [ -n "${LONG-}" ]; then # an extended request
    printf '21e41c71%08x%016x%016x%016x' $(($1)) "$2" "$3" "$4"
  else
    printf '25609513%08x%08x%08x%016x%08x' $(($1)) \
      $(($1 & 0xffff ? 0 : $4)) "$2" "$3" $(($4 & 0xffffffff))
  fi
}

# What a server sent, in words: OPTION=REPLY..., then the replies of the
# transmission phase in the order of their cookies.  ERROR.COOKIE and OK.COOKIE
# are simple replies, the others chunks; + is a chunk with more to come, ^OFFSET
# an extended one.
decode() {
  hex | awk '
    function num(at, n,  v, i) {
      for (i = at; i < at + 2 * n; i++)
        v = v * 16 + index("123456789abcdef", substr(h, i, 1))
      return v + 0
    }
    function dec(v) { return sprintf("%.0f", v) }
    function text(at, n,  s, i, c) {
      for (i = at; i < at + 2 * n; i += 2) {
        c = num(i, 1)
        s = s (c > 32 && c < 127 ? sprintf("%c", c) : "%" substr(h, i, 2))
      }
      return s
    }
    function data(at, n,  s, c) {
      s = substr(h, at, 2 * n)
      if (length(s) < 2 * n) return "short"
      c = substr(s, 1, 2)
      if (n < 9 || s != same(c, n)) return s
      return n "x" c
    }
    function same(c, n,  s) {
      for (s = c; length(s) < 2 * n; s = s s);
      return substr(s, 1, 2 * n)
    }
    function mute(at, n) { # a text of 1 to 4096 characters, all printable?
      at = substr(h, at, 2 * n)
      return n < 1 || n > 4096 || at !~ /^([2-6][0-9a-f]|7[0-9a-e])*$/
    }
    function say(s) { words = words (words == "" ? "" : " ") s }
    function later(cookie, s) { reply[++nreply] = s; key[nreply] = cookie }
    function error(e) { return e in errors ? errors[e] : "E" e }
    function option(  o, type, len, q, s) {
      o = num(p + 16, 4); type = substr(h, p + 24, 8); len = num(p + 32, 4)
      q = p + 40
      p = q + 2 * len
      if (p > n + 1) { say("cut"); return }
      s = type in types ? types[type] : type
      if (type == "00000002") {
        s = s ":" text(q + 8, num(q, 4))
        if (len > 4 + num(q, 4))
          s = s ":" text(q + 8 + 2 * num(q, 4), len - 4 - num(q, 4))
      } else if (type == "00000003") {
        s = infos[num(q, 2)]
        if (s == "export" && len == 12)
          s = s ":" dec(num(q + 4, 8)) ":" substr(h, q + 20, 4)
        else if (s == "block" && len == 14)
          s = s ":" num(q + 4, 4) ":" num(q + 12, 4) ":" dec(num(q + 20, 4))
        else s = s ":" text(q + 4, len - 2)
      } else if (type == "00000004") {
        s = text(q + 8, len - 4)
        if (o == 10) context[num(q, 4)] = s
        s = s "?"
        if (o == 9 && num(q, 4)) s = s "id"
      } else if (type == "00000001" && len) s = s ":junk"
      else if (type ~ /^8/ && mute(q, len)) s = s ":mute"
      say((o in options ? options[o] : dec(o)) "=" s)
      return type == "00000001" && o == 7
    }
    function chunk(ext,  head, type, c, len, q, s, i, m) {
      head = substr(h, p + 8, 4)
      type = num(p + 12, 2); c = num(p + 24, 4)
      len = ext ? num(p + 48, 8) : num(p + 32, 4)
      q = p + (ext ? 64 : 40)
      p = q + 2 * len
      if (p > n + 1) { say("cut"); return }
      if (type == 0) s = "none." c (len ? "junk" : "")
      else if (type == 1)
        s = "data." c "@" dec(num(q, 8)) "=" data(q + 16, len - 8)
      else if (type == 2)
        s = "hole." c "@" dec(num(q, 8)) "+" dec(num(q + 16, 4))
      else if (type == 5) {
        s = num(q, 4)
        s = "status." c "=" (s in context ? context[s] : "unknown")
        for (i = q + 8; i < p; i += 16)
          s = s ":" dec(num(i, 4)) "/" num(i + 8, 4)
      } else if (type == 6) {
        s = num(q, 4)
        s = "longstatus." c "=" (s in context ? context[s] : "unknown")
        if (num(q + 8, 4) * 16 + 8 != len) s = s ":junk"
        for (i = q + 16; i < p; i += 32)
          s = s ":" dec(num(i, 8)) "/" num(i + 16, 8)
      } else if (type == 32769 || type == 32770) {
        m = num(q + 8, 2)
        s = "!" error(num(q, 4)) "." c
        if (type == 32770) s = s "@" dec(num(q + 12 + 2 * m, 8))
        if (m != len - (type == 32769 ? 6 : 14)) s = s "junk"
        if (mute(q + 12, m)) s = s "mute"
      } else s = "chunk" type "." c
      if (ext) s = s "^" dec(num(q - 32, 8))
      later(c, s (head == "0001" ? "" : head == "0000" ? "+" : "junk"))
    }
    function simple(  e, c, len) {
      e = num(p + 8, 4); len = num(p + 16, 4); c = num(p + 24, 4)
      p += 32
      if (e || !len) { later(c, (e ? error(e) : "OK") "." c); return }
      later(c, "OK." c "=" data(p, len))
      p += 2 * len
    }
    function names(list, into,  i, w, k) {
      k = split(list, w, " ")
      for (i = 1; i < k; i += 2) into[w[i]] = w[i + 1]
    }
    { h = h $0 }
    END {
      names("1 export 2 abort 3 list 5 starttls 6 info 7 go 8 structured " \
        "9 listmeta 10 setmeta 11 extended", options)
      names("00000001 ack 00000002 server 80000001 unsup 80000002 policy " \
        "80000003 invalid 80000006 unknown 80000008 blocksize " \
        "80000009 toobig 8000000a extheader", types)
      names("0 export 1 name 2 description 3 block", infos)
      names("1 EPERM 5 EIO 12 ENOMEM 22 EINVAL 28 ENOSPC 75 EOVERFLOW " \
        "95 ENOTSUP 108 ESHUTDOWN", errors)
      n = length(h)
      p = 37
      if (substr(h, 1, 36) != "4e42444d4147494349484156454f50540003")
        say("nohello")
      while (p <= n && substr(h, p, 16) == "0003e889045565a9")
        if (option()) { on = 1; break }
      if (p <= n && !on) {
        s = "export:" dec(num(p, 8)) ":" substr(h, p + 16, 4)
        p += 20
        if (substr(h, p, 248) == same("00", 124)) { s = s "+124"; p += 248 }
        say(s)
      }
      while (p <= n)
        if (substr(h, p, 8) == "668e33ef") chunk(0)
        else if (substr(h, p, 8) == "6e8a278c") chunk(1)
        else if (substr(h, p, 8) == "67446698") simple()
        else { say("junk=" substr(h, p, 32)); break }
      for (i = 1; i <= nreply; i++) {
        least = 0
        for (k = 1; k <= nreply; k++)
          if (k in reply && (!least || key[k] < key[least])) least = k
        say(reply[least])
        delete reply[least]
      }
      print words
    }'
}

# One connection with those bytes behind the client's flags, to a server on
# stdin and stdout: GOT.  What was sent is kept for testBadInput...
raw() {
  NTALK=$((NTALK + 1))
  # shellcheck disable=SC2086
  bytes "$@" | tee "$CORPUS/$NTALK" |
    timeout 20 "$NBDSERVE" -s $ARGS "$DISK" >"$T/out" 2>>"$T/err"
  status=$?
  GOT=$(decode <"$T/out")
  [ $status -le 1 ] || GOT="$GOT exit=$status"
}
talk() { raw 00000003 "$@"; }
expect() { # words GOT should be; the usual flags stand for $FLAGS
  # shellcheck disable=SC2048,SC2086
  assertEquals "$(echo $* | sed "s/:0d6d/:$FLAGS/g")" "$GOT"
}
# What the options in $2... are answered with; the ABORT that follows, with an
# ACK only if the stream is in step
haggle() {
  expected=$1
  shift
  talk "$@" "$(opt ABORT)"
  expect "$expected" abort=ack
}
plus() { printf %04x $((0x$FLAGS | $1)); } # the usual flags, and more
# What the requests in $2... are answered with, with simple replies, after a GO
# that asks for $INFOS
simple() {
  expected=$1
  shift
  # shellcheck disable=SC2086
  talk "$(ask GO '' $INFOS)" "$@" DISC,0,0,0
  expect "go=export:$SIZE:$FLAGS $BLOCK go=ack" "$expected"
}
# The same with structured replies and base:allocation
META="$(opt STRUCTURED)$(meta SET_META '' base:allocation)"
METAOK='structured=ack setmeta=base:allocation? setmeta=ack'
structured() {
  expected=$1
  shift
  # shellcheck disable=SC2086
  talk "$META" "$(ask GO '' $INFOS)" "$@" DISC,0,0,0
  expect "$METAOK" "go=export:$SIZE:$(plus 0x80) $BLOCK go=ack" "$expected"
}
# The same with extended headers, whose ^OFFSETs may be left out
extended() {
  expected=$1
  shift
  LONG=1
  # shellcheck disable=SC2086
  talk "$(opt EXTENDED)" "$(meta SET_META '' base:allocation)" \
    "$(ask GO '' $INFOS)" "$@" DISC,0,0,0
  LONG=''
  case $expected in
    *^*) ;;
    *) GOT=$(echo "$GOT" | sed 's/\^[0-9]*//g') ;;
  esac
  expect extended=ack "${METAOK#* }" \
    "go=export:$SIZE:$(plus 0x1080) $BLOCK go=ack" "$expected"
}
# Requests that get the errors in $1 with simple, structured and extended ones
refused() {
  errors=$1
  shift
  simple "$errors" "$@"
  # shellcheck disable=SC2086
  errors=$(printf '!%s ' $errors)
  structured "$errors" "$@"
  for word; do
    shift
    case $word in WRITE*) word=WRITE+PAYLOAD${word#WRITE} ;; esac
    set -- "$@" "$word"
  done
  extended "$errors" "$@"
}

# ---- Stores, TCP and the space of the image ---------------------------------

tcp() { unless NO_TCP && needs loopback; }
blocks() { du -k "$DISK" | cut -f1; }
filled() { # 1 MiB of data
  unless POSIX_ONLY || return 1
  head -c 1048576 /dev/zero | tr '\0' x >"$DISK"
  SIZE=1048576
  full=$(blocks)
  truncate -s 2M "$T/hole"
  if [ "$full" -lt 1024 ] || [ "$(du -k "$T/hole" | cut -f1)" -ge 1024 ]; then
    skip 'no sparse files here'
    return 1
  fi
}
# A new store, $S
store() {
  S=$T/store
  unless NO_CAS || return 1
  FLAGS=$(printf %04x $((0x$FLAGS & ~0x400))) # no cache
  RO=$(printf %04x $((0x$RO & ~0x400)))
  cas 0 init "$S"
}
# A command that must end with that status: $T/out, and $T/err if it fails
cas() {
  expected=$1
  shift
  timeout 60 "$NBDSERVE" "$@" >"$T/out" 2>>"$T/err"
  STATUS=$?
  assertEquals "nbdserve $* ($(tail -n 2 "$T/err"))" "$expected" $STATUS
}
# The export of a volume is that file
same() { # VOL file
  cas 0 export "$S::$1" "$T/same"
  assertTrue "$1 is $2" "cmp '$2' '$T/same'"
  rm -f "$T/same"
}
# So many random bytes, others at each call within a test
noise() { # bytes
  build client || return
  echo >>"$W/noises"
  "$W/client" noise "$SEED" "$(wc -l <"$W/noises")" "$1"
}
names() { # sorted, in one line
  cas 0 list "$S"
  GOT=$(cut -f1 "$T/out" | sort | tr '\n' ' ')
}
listed() { # with all columns
  cas 0 list "$S"
  GOT=$(sort "$T/out")
}
stored() {
  cas 0 stat "$S"
  GOT=$(sed -n 's/^stored.//p' "$T/out")
}
uri() { echo "nbd+unix:///$1?socket=$SOCK"; }

# ==== [1] CONFIG (@config) ===================================================

testReadmeNamesEverySwitch() {
  sed -n 's/^#ifndef NBDSERVE_\([A-Z_]*\).*/\1/p' "$here/nbdserve.c" |
    sort >"$T/source"
  sed -n '/switches of section/,/^FOR THOSE/p' "$here/README" |
    sed -n 's/^    NBDSERVE_\([A-Z_]*\).*/\1/p' | grep -v '^API$' |
    sort >"$T/readme"
  assertEquals '' "$(diff "$T/source" "$T/readme" | grep '^[<>]')"
  assertTrue 'there are some' "[ $(wc -l <"$T/source") -ge 10 ]"
}
# A host's allocator is the only one, and its limits hold
testAProgramWithoutAnyBackendIsNotCompiled() {
  # shellcheck disable=SC2086
  ! $CC -DNBDSERVE_NO_FLAT -DNBDSERVE_NO_CAS -c -o "$T/x.o" \
    "$here/nbdserve.c" 2>"$T/out" || fail 'it was compiled'
  assertContains "$(cat "$T/out")" 'the program needs a backend'
  # shellcheck disable=SC2086
  does $CC -DNBDSERVE_NO_FLAT -DNBDSERVE_NO_CAS -DNBDSERVE_NO_MAIN -c \
    -o "$T/x.o" "$here/nbdserve.c"
}
testLimitsAndAllocatorMayBeSet() {
  cat >"$T/my.c" <<'END'
#include <stdio.h>
#include <stdlib.h>
static long calls;
void *my_malloc(size_t n);
void my_free(void *p);
void *my_malloc(size_t n) {
  if (!calls++) fputs("nbdserve: my malloc is called\n", stderr);
  return malloc(n);
}
void my_free(void *p) { free(p); }
END
  # shellcheck disable=SC2086
  does $CC $CFLAGS ${SWITCH:+-DNBDSERVE_$SWITCH} -DNBDSERVE_MALLOC=my_malloc \
    -DNBDSERVE_FREE=my_free -DNBDSERVE_MAX_REQUEST=65536 \
    -DNBDSERVE_MAX_OPTION=8192 -DNBDSERVE_STACK=131072 -o "$T/limited" \
    "$here/nbdserve.c" "$T/my.c" $LDLIBS
  was=$NBDSERVE NBDSERVE=$T/limited BLOCK=go=block:1:4096:65536
  haggle 'list=invalid list=toobig' "$(opt LIST "$(zeroes 8192)")" \
    "$(opt LIST "$(zeroes 8193)")"
  says 'my malloc is called'
  simple 'OK.1' WRITE,1,0,65536 @65536
  says 'my malloc is called'
  simple '' WRITE,1,0,65537 @65537
  NBDSERVE=$was
  says 'client 1: '
}

# ==== [2] PLATFORM (@platform) ===============================================

testInterruptedAndShortCallsAreFinished() { fault short "$DISK"; }
testRefusedFallocateIsReplacedByWrites() {
  for error in EPERM ENOSYS EOPNOTSUPP; do fault fallocate "$DISK" $error; done
}
testUnalignedFallocateIsReplacedByWrites() { # as a block device refuses it
  fault fallocate "$DISK" EINVAL
}
testFastZeroWithoutFallocateWritesNothing() { fault fastzero "$DISK"; }
testThreadsRefusedIsNoHarm() { fault threads "$DISK"; }

# A program in place of nbdserve, which runs it by this command: NBDSERVE, until
# tearDown
within() { # command... with %s for nbdserve
  # shellcheck disable=SC2059
  { echo '#!/bin/sh'; printf "exec $*"' "$@"\n' "$BARE"; } >"$T/within"
  chmod +x "$T/within"
  NBDSERVE=$T/within
}
# An empty root directory, $T/jail, with nbdserve, the image, and nothing else
# but what nbdserve is linked to; owned by a user who is in no file
jail() {
  needs root chroot || return 1
  [ -z "${SANITIZER-}" ] || { skip 'a sanitizer needs /proc'; return 1; }
  mkdir "$T/jail"
  for file in $(ldd "$BARE" 2>/dev/null | grep -o '/[^ ]*'); do
    mkdir -p "$T/jail${file%/*}"
    cp "$file" "$T/jail$file"
  done
  cp "$BARE" "$T/jail/nbdserve"
  cp "$DISK" "$T/jail/disk"
  # a user of this suite's own: limits count the processes of a user
  nobody=$((60000 + $$ % 5000))
  chown $nobody:$nobody "$T/jail" "$T/jail/disk"
  jailed="chroot --userspec=$nobody:$nobody '$T/jail' /nbdserve"
  within "$jailed"
}
# Where fallocate, preadv2, pwritev2, copy_file_range, getrandom, memfd_create,
# statx, splice, prctl, pipe2, accept4 and fadvise64 are refused, nothing is
# missed but what one of them is: SIGTERM when the parent ends
# Once it listens it opens nothing more; the command that it runs may.
testASandboxIsEnteredWhenAllIsOpen() {
  unless POSIX_ONLY || return 0
  [ -z "${SANITIZER-}" ] || { skip 'a sanitizer opens files'; return 0; }
  build sandbox || return 0
  "$W/sandbox" "$T" >"$T/log" 2>&1
  status=$?
  [ $status != 77 ] || { skip 'this kernel has no Landlock'; return 0; }
  assertEquals "$(cat "$T/log")" 0 $status
  for mode in auto require off; do
    serve --sandbox $mode "$DISK"
    is=$(sed -n 's/^NoNewPrivs:[^0-9]*//p' "/proc/$PID/status")
    assertEquals "$mode" "$([ $mode = off ] && echo 0 || echo 1)" "$is"
    client many "$SOCK" 4
    stop TERM
    assertEquals "$mode" 0 "$STATUS"
    assertEquals "$mode, the socket" '' "$(ls "$SOCK" 2>/dev/null)"
  done
  does "$NBDSERVE" --sandbox require "$DISK" -- sh -c ': >"$1"' - "$T/made"
  assertTrue 'the command' "[ -e '$T/made' ]"
}
testSandboxThatRefusesOptionalCallsIsNoHarm() {
  [ -z "${SANITIZER-}" ] || { skip 'a sanitizer needs them'; return 0; }
  build deny || return 0
  "$W/deny" EPERM "$BARE" -V >"$T/log" 2>&1
  [ $? != 77 ] || { skip 'no seccomp filters here'; return 0; }
  head -c 1500000 /dev/urandom >"$T/big"
  for error in EPERM ENOSYS; do
    within "$W/deny" $error %s
    image=$DISK
    for DISK in "$image" mem:64K; do
      simple 'OK.1 OK.2 OK.3 OK.4 OK.5=00000000 OK.6=61626364' \
        WRITE,1,4096,4 61626364 ZEROES,2,8192,4096 TRIM,3,16384,4096 \
        FLUSH,4,0,0 READ,5,8192,4 READ,6,4096,4
    done
    DISK=$image
    serve "$T/big"
    client compare "$SOCK" "$T/big" 0
    stop TERM
    assertEquals $error 0 "$STATUS"
    does "$NBDSERVE" "$DISK" --run 'test -S "${uri#*socket=}"'
    run --exit-with-parent -s "$DISK"
    assertEquals "$error with the parent" 1 "$STATUS"
    says 'exit-with-parent'
    run --sandbox require "$DISK" --run true
    assertEquals "$error, sandbox" 1 "$STATUS"
    says 'sandbox require: '
    [ "$SWITCH" != NO_CAS ] || continue
    S=$T/store-$error
    cas 0 init "$S"
    cas 0 import "$S::v" "$T/big"
    cas 0 snapshot "$S::v@s"
    cas 0 clone "$S::v@s" w
    cas 0 resize "$S::w" 5000
    cas 0 verify "$S"
    cas 1 gc "$S"
    says 'gc .*: .*[Nn]ot supported$' # all else it does without
    cas 0 export "$S::v@s" "$T/out-$error"
    assertTrue "$error export" "cmp '$T/big' '$T/out-$error'"
  done
}
testChrootNeedsNothingButTheTarget() { # no /proc, /dev, /tmp, /etc, shell
  jail || return 0
  DISK=/disk
  simple 'OK.1 OK.2 OK.3=61626364' WRITE,1,0,4 61626364 FLUSH,2,0,0 READ,3,0,4
  assertEquals abcd "$(head -c 4 "$T/jail/disk")"
  DISK=mem:64K
  [ "$SWITCH" = POSIX_ONLY ] || simple OK.1=00000000 READ,1,0,4 # else in /tmp
  start -U /s /disk
  client many "$T/jail/s" 3
  stop TERM
  assertEquals 0 "$STATUS"
  assertFalse 'the socket is gone' "[ -e '$T/jail/s' ]"
  run /disk
  assertEquals 'no directory for a socket' 1 "$STATUS"
  says 'private socket: no directory for it \(use -U\)$'
  run -s -T /disk
  assertEquals 'none for what is temporary' 1 "$STATUS"
  says '/tmp: No such file or directory .*TMPDIR'
  run -U /s /disk --run true
  assertEquals 'no shell' 127 "$STATUS"
  says '/bin/sh: No such file or directory$'
}
testChrootWithClosedStreamsIsNoHarm() { # where there is no /dev/null, either
  jail && build client || return 0
  for streams in '0<&-' '1>&-' '2>&-' '0<&- 1>&-' '0<&- 2>&-' '1>&- 2>&-' \
    '0<&- 1>&- 2>&-'; do
    eval "timeout 20 '$NBDSERVE' -vv -1 -U /s /disk $streams &" \
      >"$T/out" 2>"$T/noise"
    await "[ -S '$T/jail/s' ]"
    client many "$T/jail/s" 1
    wait $!
    assertEquals "$streams" 0 $?
    assertTrue "$streams: unchanged" "cmp '$DISK' '$T/jail/disk'"
  done
}
testChrootNeedsNothingButTheStore() {
  unless NO_CAS && jail || return 0
  cas 0 init /store
  cas 0 import /store::v /disk
  cas 0 snapshot /store::v@s
  if [ "$SWITCH" != NO_THREADS ]; then
    start -U /s /store::v
    client many "$T/jail/s" 1
    cas 0 snapshot /store::v@t
    assertTrue 'the server did it' "[ -S '$T/jail/store.ctl' ]"
    stop TERM
    assertEquals 0 "$STATUS"
  fi
  cas 0 verify /store
  cas 0 export /store::v@s /out
  assertTrue 'exported' "cmp '$T/jail/out' '$T/jail/disk'"
}
testReadOnlyRootIsEnoughToRead() {
  needs unshare && jail || return 0
  [ "$SWITCH" = NO_CAS ] || cas 0 init /store
  [ "$SWITCH" = NO_CAS ] || cas 0 import /store::v /disk
  unshare -m true 2>/dev/null || { skip 'no mounts of its own'; return 0; }
  cat >"$T/readonly" <<END
mount --bind '$T/jail' '$T/jail' && mount -o remount,ro,bind '$T/jail' &&
  exec chroot '$T/jail' /nbdserve "\$@"
END
  within unshare -m sh "$T/readonly"
  DISK=/disk ARGS=-r was=$FLAGS FLAGS=$RO
  simple 'OK.1=6e62' READ,1,0,2
  run -s /disk
  assertEquals 1 "$STATUS"
  says '/disk: Read-only file system.*-r'
  run -r -U /s /disk
  assertEquals 1 "$STATUS"
  says '/s: Read-only file system$'
  [ "$SWITCH" != NO_CAS ] || return 0
  cas 0 list /store
  assertEquals v "$(cut -f 1 "$T/out")"
  cas 0 export /store::v -
  assertTrue 'exported' "cmp '$T/out' '$T/jail/disk'"
  cas 1 create /store::w 1M
  says 'Read-only file system'
  cas 1 init /other
  says '/other: Read-only file system$'
}
testWithoutANetworkThereIsTheUnixSocket() {
  needs root unshare || return 0
  unshare -n true 2>/dev/null || { skip 'no network of its own'; return 0; }
  within unshare -n %s
  start "$DISK"
  client many "${URI#*socket=}" 1
  stop TERM
  assertEquals 0 "$STATUS"
}
# How many threads the jailed server may have from now on; only its own user may
# say so everywhere
threads() { # number
  setpriv --reuid="$nobody" --regid="$nobody" --clear-groups \
    prlimit --pid "$PID" --nproc="$1:50"
}
# Not one may be started at first
testLimitOfProcessesLeavesTheServerRunning() {
  needs prlimit setpriv && unless NO_THREADS && jail || return 0
  within "prlimit --nproc=1:50 $jailed"
  LOG='^nbdserve: .*(temporarily unavailable|try again)'
  start -U /s /disk
  build client || return 0
  timeout 20 "$W/client" hello "$T/jail/s" >"$T/log" 2>&1
  assertNotEquals 'no thread for the client' 0 $?
  threads 2
  client many "$T/jail/s" 1 # it does all itself
  threads 50
  client many "$T/jail/s" 4
  threads 1
  stop TERM
  assertEquals 0 "$STATUS"
}
testLimitOfProcessesLetsCommandsBeDone() {
  unless NO_CAS && unless NO_THREADS || return 0
  needs prlimit setpriv && jail || return 0
  cas 0 init /store
  cas 0 import /store::v /disk
  within "prlimit --nproc=4:50 $jailed"
  start -U /s /store::v
  threads 1
  within "$jailed"
  cas 0 snapshot /store::v@s
  cas 0 list /store
  assertEquals 'v v@s ' "$(cut -f 1 "$T/out" | tr '\n' ' ')"
  threads 50
  stop TERM
  assertEquals 0 "$STATUS"
}
testLimitOfMemoryLeavesTheServerRunning() {
  needs prlimit && unless NO_THREADS || return 0
  [ -z "${SANITIZER-}" ] || { skip 'a sanitizer needs memory'; return 0; }
  LOG='^nbdserve: .*(memory|temporarily unavailable)(;.*)?$'
  within prlimit --as=30000000 %s
  serve "$DISK"
  build client || return 0
  for n in 1 2 3 4 5 6; do # some of them are refused
    timeout 20 "$W/client" crowd "$SOCK" 150 >"$T/log" 2>&1
    [ $n -lt 3 ] || [ ! -s "$T/err" ] || break
  done
  assertTrue 'it was too little' "[ -s '$T/err' ]"
  client many "$SOCK" 4
  stop TERM
  assertEquals 0 "$STATUS"
}
testPrivateSocketIsInTmpWhereTMPDIRCannotHaveIt() {
  long=$T/$(printf %0120d 0)
  mkdir "$long"
  for TMPDIR in "$T/none" . "$long"; do
    export TMPDIR
    run "$DISK" --run 'echo "$uri" >&2'
    assertEquals "$TMPDIR" 0 "$STATUS"
    assertContains "$TMPDIR" "$(cat "$T/err")" 'socket=/tmp/nbd'
    : >"$T/err"
  done
  unset TMPDIR
  assertEquals 'nothing is left' '' "$(ls "$long")"
}
# What is written to a stream that is not open goes nowhere, and above all not
# to an image that has got its number
testNoCombinationOfClosedStreamsMeetsAnImage() {
  cp "$DISK" "$T/copy"
  [ "$SWITCH" = NO_CAS ] || store || return 0
  [ "$SWITCH" = NO_CAS ] || cas 0 import "$S::v" "$DISK"
  for closed in 0 1 2 01 02 12 012; do
    streams=
    case $closed in *0*) streams='0<&-' ;; esac
    case $closed in *1*) streams="$streams 1>&-" ;; esac
    case $closed in *2*) streams="$streams 2>&-" ;; esac
    eval "timeout 20 '$NBDSERVE' -vv -1 -U '$T/s' '$DISK' $streams &" \
      >"$T/out" 2>"$T/noise"
    await "[ -S '$T/s' ]"
    client many "$T/s" 1
    wait $!
    assertEquals "$closed closed" 0 $?
    assertTrue "$closed closed: unchanged" "cmp '$DISK' '$T/copy'"
    [ "$SWITCH" != NO_CAS ] || continue
    eval "timeout 20 '$NBDSERVE' seal '$S::none@s' $streams" \
      >"$T/out" 2>"$T/noise"
    assertEquals "$closed closed: no volume" 1 $?
    eval "timeout 20 '$NBDSERVE' export '$S::v' - $streams" \
      >"$T/out" 2>"$T/noise"
    status=$?
    case $closed in
      *1*) assertEquals "$closed closed: no output" 1 $status ;;
      *) assertTrue "$closed closed: output" "cmp '$T/out' '$T/copy'" ;;
    esac
  done
  [ "$SWITCH" = NO_CAS ] || cas 0 verify "$S"
}

# ==== [3] UTIL (@util) =======================================================

testSizesTakeSuffixes() {
  for size in 1:1 1000:1000 1K:1024 3k:3072 1M:1048576 2G:2147483648; do
    rm "$DISK"
    ARGS="--create ${size%:*}" SIZE=${size#*:}
    simple ''
  done
  rm "$DISK"
  ARGS='--create 1T' SIZE=1099511627776
  simple ''
  DISK=mem:5K SIZE=5120 ARGS=''
  simple ''
}
testBadMemorySizesAreNamed() {
  for size in '' x 1Q -1 0x10 99999999999999999999 1M2; do
    run -s "mem:$size"
    assertNotEquals "mem:$size" 0 "$STATUS"
    says "mem:$size"
  done
}
testUriEscapesTheExportName() {
  serve -e 'a b/ü' "$DISK"
  assertEquals "nbd+unix:///a%20b/%C3%BC?socket=$SOCK" "$URI"
}
testVerboseNamesClients() {
  serve -v "$DISK"
  client hello "$SOCK"
  stop TERM
  says client
}
testLinesOfSeveralClientsAreNotMixed() {
  truncate -s 1M "$DISK"
  serve -vv "$DISK"
  client crowd "$SOCK" 20
  client flushes "$SOCK" 8
  stop TERM
  assertTrue 'lines' "[ $(wc -l <"$T/err") -gt 1000 ]"
  line='^nbdserve: .*client [0-9]*: [a-zN]'
  assertEquals 'other lines' '' "$(grep -v "$line" \
    "$T/err" | head -n 3)"
  : >"$T/err"
}
testNamesAreUtf8() {
  ARGS='-e grün'
  haggle 'info=export:65536:0d6d info=ack info=unknown' \
    "$(ask INFO "$(of grün)")" "$(ask INFO "$(of grun)")"
}
testLibraryEscapesUris() { unit uris; }

# ==== [4] SHA-256 (@sha) =====================================================

testSha256OfTheStandardsExamples() { unit fips; }
testSha256IsTheSameByAllWays() { unit ways; }

# ==== [5] WIRE (@wire) =======================================================

testUnknownFlagsAreEINVAL() {
  for command in READ TRIM CACHE ZEROES FLUSH; do
    simple 'EINVAL.1 EINVAL.2' $command+0x400000,1,0,0 \
      $command+0x80000000,2,0,0
  done
}
testFlagsOfOtherCommandsAreEINVAL() {
  simple 'EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 EINVAL.5 EINVAL.6 EINVAL.7' \
    READ+NO_HOLE,1,0,1 TRIM+FAST,2,0,512 READ+REQ_ONE,3,0,1 \
    FLUSH+NO_HOLE,4,0,0 CACHE+DF,5,0,512 ZEROES+DF,6,0,512 \
    ZEROES+REQ_ONE,7,0,512
  assertEquals 6e "$(at 0 1)"
}
testUnknownFlagsAndThoseOfOtherCommandsAreEINVALWithChunksToo() {
  refused 'EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 EINVAL.5 EINVAL.6 EINVAL.7
    EINVAL.8 EINVAL.9 EINVAL.10 EINVAL.11 EINVAL.12' READ+NO_HOLE,1,0,1 \
    READ+REQ_ONE,2,0,1 READ+0x400000,3,0,1 WRITE+DF,4,0,2 5858 \
    WRITE+0x80000000,5,0,1 58 FLUSH+DF,6,0,0 TRIM+REQ_ONE,7,0,512 \
    CACHE+NO_HOLE,8,0,512 ZEROES+REQ_ONE,9,0,512 STATUS_OF+DF,10,0,512 \
    STATUS_OF+NO_HOLE,11,0,512 STATUS_OF+0x1000000,12,0,512
  assertEquals 6e62 "$(at 0 2)"
}
testFuaIsTakenOnEveryCommand() {
  structured 'data.1@0=6e OK.2 OK.3 OK.4 OK.5 OK.6
    status.7=base:allocation:512/0' \
    READ+FUA,1,0,1 WRITE+FUA,2,100,1 61 \
    FLUSH+FUA,3,0,0 TRIM+FUA,4,4096,4096 \
    CACHE+FUA,5,0,512 ZEROES+FUA,6,8192,512 \
    STATUS_OF+FUA+REQ_ONE,7,0,512
}
testFuaIsTakenWithExtendedHeadersToo() {
  extended 'data.1@0=6e none.2 none.3 none.4 none.5 none.6
    longstatus.7=base:allocation:512/0' READ+FUA,1,0,1 \
    WRITE+FUA+PAYLOAD,2,100,1 61 FLUSH+FUA,3,0,0 TRIM+FUA,4,4096,4096 \
    CACHE+FUA,5,0,512 ZEROES+FUA,6,8192,512 STATUS_OF+FUA+REQ_ONE,7,0,512
}
testExtendedRepliesHave32BytesAndTheCookie() {
  for cookie in 0000000000000000 ffffffffffffffff 6e8a278c21e41c71; do
    flush=21e41c7100000003$cookie$(printf %016x 7 0)
    talk "$(opt EXTENDED)" "$(ask GO)" "$flush" "$flush"
    none=6e8a278c00010000$cookie$(printf %016x 7 0)
    assertEquals "$none$none" "$(tail -c 64 "$T/out" | hex)"
    talk "$(opt EXTENDED)" "$(ask GO)" \
      "21e41c7100000000$cookie$(printf %016x 1 2)"
    assertEquals "6e8a278c00010001$cookie$(printf %016x 1 10 1)6264" \
      "$(tail -c 42 "$T/out" | hex)"
  done
}
testReadBeyondTheEndIsEINVAL() {
  simple 'EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 OK.5=6e' READ,1,65536,1 \
    READ,2,65535,2 READ,3,0,65537 READ,4,70000,512 READ,5,0,1
  structured '!EINVAL.1 !EINVAL.2' READ,1,65536,1 READ+DF,2,65535,2
}
testWriteBeyondTheEndIsENOSPCAndInStep() {
  simple 'ENOSPC.1 ENOSPC.2 OK.3=6e' WRITE,1,65536,1 61 WRITE,2,65530,28 \
    READ,9,0,1 READ,3,0,1
  structured '!ENOSPC.1' WRITE,1,65535,2 6161
  assertEquals 000000000000 "$(at 65530 7)"
  assertEquals 65536 "$(wc -c <"$DISK")"
}
testWriteZeroesBeyondTheEndIsENOSPC() {
  simple 'ENOSPC.1 ENOSPC.2' ZEROES,1,0,65537 ZEROES+FAST,2,65536,1
  structured '!ENOSPC.1' ZEROES,1,65535,2
  assertEquals 6e "$(at 0 1)"
}
testTrimPastTheEndIsEINVAL() {
  simple 'EINVAL.1 EINVAL.2' TRIM,1,0,65537 TRIM,2,65536,1
  assertEquals 6e "$(at 0 1)"
}
testCachePastTheEndIsEINVAL() {
  simple 'EINVAL.1 OK.2' CACHE,1,0,65537 CACHE,2,0,65536
}
testBlockStatusPastTheEndIsEINVAL() {
  structured '!EINVAL.1 !EINVAL.2 !EINVAL.3' STATUS_OF,1,0,65537 \
    STATUS_OF,2,65536,1 STATUS_OF,3,-1,2
}
testReadOnlyRefusesWritesWithEPERM() {
  ARGS=-r FLAGS=$RO
  cp "$DISK" "$T/copy"
  simple 'EPERM.1 EPERM.2 EPERM.3 OK.4=6e' WRITE,1,0,28 READ,9,0,1 \
    TRIM,2,0,4096 ZEROES,3,0,4096 READ,4,0,1
  structured '!EPERM.1 !EPERM.2' ZEROES,1,0,4096 TRIM,2,0,4096
  assertTrue "cmp '$DISK' '$T/copy'"
}
testReadOnlyRefusesWritesWithChunksToo() {
  ARGS=-r FLAGS=$RO
  cp "$DISK" "$T/copy"
  refused 'EPERM.1 EPERM.2 EPERM.3 EPERM.4 EPERM.5' WRITE,1,0,1 58 \
    WRITE,2,0,200000 @200000 TRIM,3,0,4096 ZEROES,4,0,4096 \
    ZEROES+FAST+NO_HOLE,5,0,4096
  assertTrue "cmp '$DISK' '$T/copy'"
}
testReadOnlyAnswersWhatIsNoWrite() {
  ARGS=-r FLAGS=$RO
  structured 'data.1@0=6e OK.2 status.3=base:allocation:512/0' READ+DF,1,0,1 \
    CACHE,2,0,512 STATUS_OF+REQ_ONE,3,0,512
}
testErrorsAreMappedToNbds() { unit errors; }

# ==== [6] SOCKET I/O (@io) ===================================================

testStallEndsWhoStopsHalfway() {
  unless NO_THREADS && needs python3 || return 0
  serve --stall 1 "$DISK"
  LOG='^nbdserve: .*client .*timed out'
  assertEquals 'idle served halfway dropped' "$(python3 -c 'import socket, sys
def client():
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(60)
    s.connect(sys.argv[1])
    s.recv(18, socket.MSG_WAITALL)
    s.send(bytes.fromhex(sys.argv[2]))
    return s
idle, halfway = client(), client()
for s in idle, halfway:
    s.recv(10 + 32 + 20, socket.MSG_WAITALL)
halfway.send(bytes.fromhex(sys.argv[3][:40]))
got = halfway.recv(1)
idle.send(bytes.fromhex(sys.argv[3]))
print("idle", "served" if len(idle.recv(18, socket.MSG_WAITALL)) == 18 else "",
      "halfway", "answered" if got else "dropped")' "$SOCK" \
    "00000003$(ask GO '')" "$(req READ 1 0 2)" 2>&1)"
}
testAbortOfAClientThatIsGoneIsNoHarm() {
  LOG='^nbdserve: .*client'
  { sleep 0.1; cat "$W/abort"; } | {
    timeout 20 "$NBDSERVE" -s "$DISK" 2>>"$T/err"
    echo $? >"$T/status"
  } | :
  await "[ -s '$T/status' ]"
  assertTrue "status $(cat "$T/status")" "[ $(cat "$T/status") -le 1 ]"
}
testEndOfInputInTheMiddleFinishesWhatCameBefore() {
  LOG='^nbdserve: .*client'
  write="$(req WRITE 1 0 1)58"
  talk "$(ask GO)" "$write"
  expect 'go=export:65536:0d6d go=ack OK.1'
  talk "$(ask GO)" "$write" 25609513
  expect 'go=export:65536:0d6d go=ack OK.1'
  talk "$(ask GO)" "$write" WRITE,2,0,4 595959
  expect 'go=export:65536:0d6d go=ack OK.1'
  assertEquals 58 "$(at 0 1)"
}
testAClientThatNeverReadsHarmsNobody() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .*client'
  truncate -s 256M "$DISK"
  serve "$DISK"
  client stall "$SOCK" "$PID" $((400000 + SLACK))
}
testAClientThatNeverReadsLeavesMemoryForOthers() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .*client'
  truncate -s 256M "$DISK"
  serve "$DISK"
  client stall "$SOCK" "$PID" $((400000 + SLACK)) 4000000
}
testNobodyWaitsForNagle() { unit nagle; }
testVanishingClientRaisesNoSIGPIPE() { unit vanish; }
testHandshakeHasADeadline() { unit deadline; }
testWhoStallsIsDroppedAndWhoIsIdleIsNot() { unit stalls; }
testWhoStallsWithAWorkersReplyOverAPipeIsDropped() { unit sipworker; }
testPipelinedOptionsDoNotProlongTheHandshake() { unit pipelined; }
testARequestHasItsTimeInTotal() {
  unless NO_THREADS || return 0
  unit total
}
testWhoIsCutOffForNotReadingHasNotLeftInOrder() { unit unread; }
testWhatComesAfterTheEndIsNotTakenForEver() { unit linger; }
# The server has to notice that nobody reads its pipe, although TRIMs go on
# coming and all it sends is their replies
testTrimsWhoseRepliesNobodyReadsEndTheServer() {
  LOG='^nbdserve: .*client'
  bytes 00000003 "$(ask GO)" >"$T/hello"
  bytes TRIM,1,0,4096 >"$T/trim"
  {
    cat "$T/hello"
    n=0
    while [ $n -lt 80 ] && cat "$T/trim" 2>/dev/null; do
      n=$((n + 1))
      sleep 0.05
    done
    echo $n >"$T/sent"
  } | timeout 20 "$NBDSERVE" -s "$DISK" 2>>"$T/err" |
    head -c 70 >"$T/greeting" # 18, and GO's replies of 32 and 20
  await "[ -s '$T/sent' ]"
  assertEquals 'bytes of the greeting' 70 "$(wc -c <"$T/greeting")"
  assertTrue "took $(cat "$T/sent") TRIMs" "[ $(cat "$T/sent") -lt 40 ]"
}
testAClientThatNeverPausesHoldsUpNoStop() { unit flooded; }
testAReplyThatCannotBeSentEndsTheConnectionAtOnce() { unit sendfails; }

# ==== [7] EXPORT (@export) ===================================================

testTwoExportsOfOneNameAreRefused() {
  run -U "$T/s" a="$DISK" a=mem:1K
  assertNotEquals 0 "$STATUS"
  says a
}
testTheFirstExportIsTheDefaultOne() {
  ARGS='-e known'
  haggle 'info=export:65536:0d6d info=ack' "$(ask INFO)"
}
testASingleTargetAnswersToEveryName() {
  haggle 'info=export:65536:0d6d info=name: info=ack' \
    "$(ask INFO "$(of whatever)" 1)"
}
testEachNameReachesItsExport() {
  ARGS='a=mem:1K b=mem:2K' DISK=c=mem:3K
  haggle 'info=export:1024:0d6d info=name:a info=ack
    info=export:2048:0d6d info=name:b info=ack
    info=export:1024:0d6d info=name:a info=ack info=unknown' \
    "$(ask INFO "$(of a)" 1)" "$(ask INFO "$(of b)" 1)" "$(ask INFO '' 1)" \
    "$(ask INFO "$(of d)" 1)"
  talk "$(ask GO "$(of c)")" READ,1,3071,1 READ,2,3071,2 DISC,0,0,0
  expect 'go=export:3072:0d6d go=ack OK.1=00 EINVAL.2'
  talk "$(opt EXPORT_NAME "$(of b)")" DISC,0,0,0
  expect export:2048:0d6d
  talk "$(opt EXPORT_NAME)" DISC,0,0,0
  expect export:1024:0d6d
}
testSizeIsAMultipleOfTheMinimumBlock() {
  truncate -s 70000 "$DISK"
  ARGS='-b 512:4096:1M'
  haggle 'info=export:69632:0d6d info=block:512:4096:1048576 info=ack' \
    "$(ask INFO '' 3)"
}
testBlockSizesAgainstTheRulesAreUsageErrors() {
  for sizes in 131072:131072:1M 1:256:1M 4096:512:1M 512:3000:1M \
    512:4096:2048 0:4096:1M 1:4096:0; do
    run -s -b $sizes "$DISK"
    assertEquals "$sizes" 2 "$STATUS"
    says block-size
  done
}
testSeveralConnectionsAreOfferedIfThereMayBeSeveral() {
  unless NO_THREADS || return 0
  ARGS='-m 1' FLAGS=0c6d
  simple ''
  structured ''
}
testFlagsOfAReadOnlyExport() {
  ARGS=-r FLAGS=$RO
  simple ''
  structured ''
}
testFlagsOfAWritableExport() {
  simple ''
  structured ''
}
testFlushesOfManyConnections() {
  truncate -s 1M "$DISK"
  serve "$DISK"
  client flushes "$SOCK" 8 40
}
testUnknownExportFlagsAreRefused() { unit flags; }
testNULLNamesTheDefaultExport() { unit null; }
testSerialBackendIsCalledOneAtATime() { unit serial; }
testBackendSeesOnlySoundRequests() { unit requests; }
testFuaIsAFlushUnlessNative() { unit fua; }
testMissingMembersAreEmulatedOrNotOffered() { unit missing; }
testOperationsThatLieAreEIO() { unit lies; }
testCallbacksThatLieAreToldAsErrors() { unit liestold; }
testWithoutMemoryNothingIsHalfMade() { fault scarce "$DISK"; }
testFailedFlushIsReportedAndCloseComesOnce() { unit flush; }
testFlushCoversWhatWasWrittenWhileAnotherRan() { unit joined; }
testExportsAreFoundOnDemand() { unit find; }
testSignalsReachAHostAsItHasThem() { unit signals; }
testFlushesOfFoundExportsAreCounted() { unit counted; }
testFailedLastFlushOfAFoundExportIsLogged() { unit lastflush; }
testExtentsAreMergedAndCut() { unit extents; }
testResizeShowsToNewClients() { unit resize; }
testBackendsMayChangeTheirSize() { unit sizes; }
testEveryRequestIsAnnouncedAndMayBeRefused() { unit before; }
testWhatNeedsWhatIsTakenAwayIsGoneToo() { unit dependent; }
testWhatIsTakenAwayIsGoneAndTheRestWorks() { unit without; }
testZeroesThatAreWrittenAreAsDurableAsAsked() { unit fuazero; }
testSerialBackendIsCalledOneAtATimeForAllRequests() { unit serialmix; }

# ==== [8] HANDSHAKE (@handshake) =============================================

testHelloIsFixedNewstyleWithNoZeroes() {
  talk
  assertEquals 4e42444d4147494349484156454f50540003 "$(hex <"$T/out")"
}
testUnknownClientFlagDropsTheConnection() {
  LOG='^nbdserve: .*client'
  for flag in 00000007 80000003 00010000; do
    raw $flag "$(opt LIST)"
    assertEquals "$flag" '' "$GOT"
    assertEquals "$flag" 18 "$(wc -c <"$T/out")"
  done
}
testClientWithoutFlagsIsServed() {
  raw 00000000 "$(opt LIST)" "$(opt EXPORT_NAME)" DISC,0,0,0
  expect 'list=server: list=ack export:65536:0d6d+124'
}
testExportNameIsFollowedBy124ZeroesUnlessDeclined() {
  raw 00000001 "$(opt EXPORT_NAME)" READ,1,0,1 DISC,0,0,0
  expect 'export:65536:0d6d+124 OK.1=6e'
  raw 00000003 "$(opt EXPORT_NAME)" READ,1,0,1 DISC,0,0,0
  expect 'export:65536:0d6d OK.1=6e'
}
testNoZeroesAloneIsTaken() {
  raw 00000002 "$(opt EXPORT_NAME)" READ,1,0,1 DISC,0,0,0
  expect 'export:65536:0d6d OK.1=6e'
}
testGoIsNeverFollowedByZeroes() {
  for flags in 00000000 00000001; do
    raw $flags "$(ask GO)" READ,1,0,1 DISC,0,0,0
    expect 'go=export:65536:0d6d go=ack OK.1=6e'
  done
}
testExportNameOffersDfWithStructuredReplies() {
  talk "$(opt STRUCTURED)" "$(opt EXPORT_NAME)" READ+DF,1,0,2 DISC,0,0,0
  expect structured=ack "export:65536:$(plus 0x80) data.1@0=6e62"
}
testExportNameOfAnUnknownExportCloses() {
  LOG='^nbdserve: .*client' ARGS='-e known'
  talk "$(opt EXPORT_NAME "$(of nope)")" "$(opt LIST)"
  assertEquals '' "$GOT"
  talk "$(opt EXPORT_NAME "$(of known)")"
  expect export:65536:0d6d
}
testExportNameWithNulInsideCloses() {
  LOG='^nbdserve: .*client' ARGS='-e known'
  talk "$(opt EXPORT_NAME "$(of known)00$(of junk)")" "$(opt LIST)"
  assertEquals '' "$GOT"
}
testExportNameEndsHaggling() {
  LOG='^nbdserve: .*client'
  talk "$(opt EXPORT_NAME)" "$(opt LIST)" # no request: closed
  expect export:65536:0d6d
}
testBadOptionMagicCloses() {
  LOG='^nbdserve: .*client'
  talk 49484156454f50550000000300000000 "$(opt ABORT)"
  assertEquals '' "$GOT"
}
testHandshakeCutAnywhereIsNoHarm() {
  LOG='^nbdserve: .*client'
  whole=00000003$META$(ask GO '' 0 3)
  for end in 0 1 3 4 11 12 19 20 23 35 60 90 120; do
    NTALK=$((NTALK + 1))
    bytes "$whole" | head -c $end | timeout 20 "$NBDSERVE" -s "$DISK" \
      >"$T/out" 2>>"$T/err"
    assertTrue "status after $end bytes" "[ $? -le 1 ]"
  done
}
testUnknownOptionIsUnsupAndItsDataSkipped() {
  haggle '0=unsup 99=unsup 99=unsup 4294967295=unsup' "$(opt 0)" "$(opt 99)" \
    "$(opt 99 "$(opt LIST)")" "$(opt 0xffffffff 00)"
}
testStarttlsWithDataIsUnsupAndSkipped() {
  haggle 'starttls=unsup list=server: list=ack' \
    "$(opt STARTTLS "$(opt ABORT)")" "$(opt LIST)"
}
testOptionsNotOfferedAreUnsup() {
  haggle 'starttls=unsup 4=unsup 12=unsup' "$(opt STARTTLS)" \
    "$(opt PEEK "$(of name)")" "$(opt 12)"
}
testDataThatLooksLikeAnOptionIsStillData() {
  data=$(opt ABORT)$(opt LIST)
  haggle 'list=invalid structured=invalid list=server: list=ack' \
    "$(opt LIST "$data")" "$(opt STRUCTURED "$data")" "$(opt LIST)"
  haggle 'info=invalid go=invalid' "$(opt INFO "000000000000$(opt LIST)")" \
    "$(opt GO "$(opt LIST)")"
  haggle 'structured=ack setmeta=invalid listmeta=invalid' "$(opt STRUCTURED)" \
    "$(opt SET_META "$(opt LIST)")" \
    "$(opt LIST_META "0000000000000000$(opt LIST)")"
}
testMalformedInfoAndGoAreInvalid() {
  for data in '' 00 0000000000 00000001 000000010000 0000000161 \
    000000020000ff 7fffffff0000 ffffffff0000 fffffffa0000 fffffffe0000 \
    000000000001 00000000000100 00000000ffff0000 00000000000200000001ff \
    00000000000000 0000000000000000 0000000000010000ff 000000016100000000; do
    haggle 'info=invalid go=invalid' "$(opt INFO $data)" "$(opt GO $data)"
  done
}
testMalformedMetaContextOptionsAreInvalid() {
  for data in '' 00 00000000 00000001 0000000100000000 00000000000000 \
    ffffffff00000000 fffffff800000000 0000000000000001 00000000ffffffff \
    000000000000000100000001 0000000000000001ffffffff \
    000000000000000100000010"$(of base:allocation)" \
    0000000000000001000000ff"$(of base:allocation)" \
    00000000000000010000000f"$(of base:allocation)"00 \
    000000000000000000 \
    00000000000000020000000f"$(of base:allocation)"; do
    haggle 'structured=ack setmeta=invalid listmeta=invalid' \
      "$(opt STRUCTURED)" "$(opt SET_META "$data")" "$(opt LIST_META "$data")"
  done
}
testOptionOver64KiBIsTooBigAndSkipped() {
  for size in 65537 3000000; do
    for option in 3 6 7 8 9 10; do
      talk "$(printf '49484156454f5054%08x%08x' $option $size)" "@$size" \
        "$(opt ABORT)"
      assertEquals "$option" 'toobig abort=ack' "${GOT#*=}"
    done
    haggle 99=unsup "$(printf '49484156454f5054%08x%08x' 99 $size)" "@$size"
  done
  haggle list=invalid "$(printf '49484156454f50540000000300010000')" @65536
}
testNamesOf4096BytesWorkAndLongerOnesDoNot() {
  name=$(printf %04096d 7)
  ARGS="-e $name"
  haggle 'info=export:65536:0d6d info=ack' "$(ask INFO "$(of "$name")")"
  ARGS=
  talk "$(ask INFO "$(of "${name}7")")" "$(opt ABORT)"
  case $GOT in
    'info=toobig abort=ack' | 'info=unknown abort=ack') ;;
    *) fail "4097 bytes: $GOT" ;;
  esac
  run -s -e "${name}7" "$DISK"
  assertEquals '-e with 4097 bytes' 2 "$STATUS"
  says name
}
testExportNameOf4096BytesWorksAndALongerOneCloses() {
  name=$(printf %04096d 7)
  ARGS="-e $name"
  talk "$(opt EXPORT_NAME "$(of "$name")")" DISC,0,0,0
  expect export:65536:0d6d
  LOG='^nbdserve: .*client' ARGS=
  talk "$(opt EXPORT_NAME "$(of "${name}7")")" "$(opt LIST)"
  assertEquals '' "$GOT"
}
testNamesMayHaveAnyByteButNul() {
  name=$(awk 'BEGIN { for (i = 1; i < 128; i++) printf "%c", i }')é€𝄞
  info=$(ask INFO "$(of "$name")") list=$(opt LIST) abort=$(opt ABORT)
  ARGS=-e$name was=$IFS IFS='' # one word
  set -f
  talk "$info" "$list" "$abort"
  set +f
  IFS=$was
  assertContains "$GOT" 'info=ack list=server:%01'
  assertContains "$GOT" 'list=ack abort=ack'
  assertContains "$(hex <"$T/out")" "00000088$(of "$name")"
}
testListGivesLongNamesAndDescriptionsWhole() {
  name=$(printf %04096d 1) text=$(printf %04096d 2)
  ARGS="-e $name -D $text"
  haggle "list=server:$name:$text list=ack info=export:65536:0d6d
    info=description:$text info=ack" "$(opt LIST)" \
    "$(ask INFO "$(of "$name")" 2)"
  run -s -D "${text}2" "$DISK"
  assertEquals '-D with 4097 bytes' 2 "$STATUS"
  says description
}
testNamesWithNulInsideAreInvalid() {
  ARGS='-e known'
  haggle 'info=invalid go=invalid' "$(ask INFO "$(of known)00$(of junk)")" \
    "$(ask GO "$(of known)00")"
  haggle 'structured=ack setmeta=invalid listmeta=invalid' "$(opt STRUCTURED)" \
    "$(meta SET_META "$(of known)00" base:allocation)" \
    "$(meta LIST_META "$(of known)00")"
}
testUnknownExportIsUnknownAndHagglingGoesOn() {
  ARGS='-e known'
  haggle 'info=unknown go=unknown info=export:65536:0d6d info=ack' \
    "$(ask INFO "$(of know)")" "$(ask GO "$(of nope)")" \
    "$(ask INFO "$(of known)")"
}
testListMayBeRepeated() {
  ARGS='-e known'
  haggle 'list=server:known list=ack list=server:known list=ack' "$(opt LIST)" \
    "$(opt LIST)"
}
testListNamesAllExportsAndDescriptions() {
  ARGS='-D what a=mem:1K b=mem:1K'
  DISK=c=mem:1K
  haggle 'list=server:a:what list=server:b:what list=server:c:what list=ack' \
    "$(opt LIST)"
}
testListWithDataIsInvalid() {
  haggle 'list=invalid list=server: list=ack' "$(opt LIST 00)" "$(opt LIST)"
}
testAbortIsAcknowledgedWhateverItsDataThenClosed() {
  talk "$(opt ABORT)" "$(opt LIST)"
  assertEquals abort=ack "$GOT"
  talk "$(opt ABORT "$(opt LIST)")" "$(opt LIST)"
  assertEquals abort=ack "$GOT"
}
testAbortWithMuchDataIsAcknowledged() {
  talk "$(printf '49484156454f5054%08x%08x' 2 300000)" @300000 "$(opt LIST)"
  assertEquals abort=ack "$GOT"
}
testInfoAndGoGiveTheSameAnswers() {
  ARGS='-e known -D about'
  talk "$(ask INFO "$(of known)" 0 1 2 3)" "$(ask GO "$(of known)" 0 1 2 3)" \
    DISC,0,0,0
  GOT=$(echo "$GOT" | tr ' ' '\n' | sort | tr '\n' ' ')
  GOT=${GOT% } expected=''
  for o in go info; do
    expected="$expected $o=ack $o=block:1:4096:33554432
      $o=description:about $o=export:65536:0d6d $o=name:known"
  done
  expect "$expected"
}
testInfoAndGoGiveTheSameAnswersWithChunksToo() {
  ARGS='-e known -D about'
  for mode in STRUCTURED EXTENDED; do
    talk "$(opt $mode)" "$(meta SET_META "$(of known)" base:allocation)" \
      "$(ask INFO "$(of known)" 0 1 2 3)" "$(ask GO "$(of known)" 0 1 2 3)"
    for o in info go; do
      echo "$GOT" | tr ' ' '\n' | sed -n "s/^$o=//p" | sort >"$T/$o"
    done
    assertEquals 5 "$(wc -l <"$T/go")"
    assertTrue "$mode: $GOT" "cmp '$T/info' '$T/go'"
  done
  assertContains "$GOT" "info=export:65536:$(plus 0x1080)"
  LOG='^nbdserve: .*client'
}
testInformationAskedForTwiceComesOnce() {
  haggle 'info=export:65536:0d6d info=name: info=block:1:4096:33554432
    info=ack' "$(ask INFO '' 3 1 2 3 0 0 1 2)"
}
testExportInformationComesUnasked() {
  haggle 'info=export:65536:0d6d info=ack' "$(ask INFO)"
  haggle 'info=export:65536:0d6d info=ack' "$(ask INFO '' 0)"
}
testUnknownInformationTypesAreIgnored() {
  haggle 'info=export:65536:0d6d info=ack' "$(ask INFO '' 4 65535 999 0)"
}
testBlockSizesComeWhenAsked() {
  talk "$(ask INFO '' 3)" "$(opt ABORT)"
  assertContains "$GOT" 'info=block:1:4096:33554432'
  ARGS='-b 512:8192:1M'
  talk "$(ask GO '' 3)" READ,1,0,512 DISC,0,0,0
  assertContains "$GOT" 'go=block:512:8192:1048576'
  assertContains "$GOT" 'go=ack OK.1=6e'
}
testBlockSizesNotAskedForAreRequired() {
  ARGS='-b 512:8192:1M'
  talk "$(ask GO)" "$(ask GO '' 0)" "$(opt ABORT)"
  assertEquals 'go=block:512:8192:1048576 go=blocksize '\
'go=block:512:8192:1048576 go=blocksize abort=ack' \
    "$(echo "$GOT" | sed "s/go=export:65536:$FLAGS //g")"
}
testBlockSizesAskedForAreNeverRequired() {
  ARGS='-b 512:8192:1M'
  haggle 'info=export:65536:0d6d info=block:512:8192:1048576 info=ack' \
    "$(ask INFO '' 3)"
  LONG=1
  talk "$(opt EXTENDED)" "$(ask GO)" "$(ask GO '' 3)" FLUSH,1,0,0 DISC,0,0,0
  LONG=
  go="go=export:65536:$(plus 0x80) go=block:512:8192:1048576"
  expect "extended=ack $go go=blocksize $go go=ack none.1^0"
}
testExportNameWithAMinimumBlockErrsWithoutHarm() {
  ARGS='-b 512:4096:1M'
  talk "$(opt EXPORT_NAME)" READ,1,1,1 WRITE,2,0,1 58 ZEROES,3,1,512 \
    TRIM,4,0,3 READ,5,512,512 DISC,0,0,0
  expect 'export:65536:0d6d EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 OK.5=512x00'
  assertEquals 6e62 "$(at 0 2)"
}
testStructuredRepliesMayBeAskedForAgain() {
  talk "$(opt STRUCTURED)" "$(opt STRUCTURED)" "$(opt ABORT)"
  assertContains 'structured=ack structured=ack abort=ack
    structured=ack structured=invalid abort=ack' "$GOT"
}
testStructuredRepliesWithDataAreInvalidAndNotNegotiated() {
  haggle 'structured=invalid setmeta=invalid' "$(opt STRUCTURED 00)" \
    "$(meta SET_META '' base:allocation)"
}
testExtendedHeadersAreAcknowledgedAndMayBeAskedForAgain() {
  haggle 'extended=ack extended=ack' "$(opt EXTENDED)" "$(opt EXTENDED)"
  haggle 'structured=ack extended=ack' "$(opt STRUCTURED)" "$(opt EXTENDED)"
}
testExtendedHeadersWithDataAreInvalidAndNotNegotiated() {
  haggle 'extended=invalid setmeta=invalid' "$(opt EXTENDED 00)" \
    "$(meta SET_META '' base:allocation)"
}
testListThatFailsIsAnErrorAndHagglingGoesOn() { unit listfails; }
testRefusedOptionsLeaveTheRepliesSimple() {
  talk "$(opt STRUCTURED 00)" "$(opt EXTENDED 00)" "$(ask GO)" READ,1,0,1 \
    DISC,0,0,0
  expect 'structured=invalid extended=invalid go=export:65536:0d6d go=ack
    OK.1=6e'
}
testExtendedHeadersTakePrecedenceOverStructuredReplies() {
  LONG=1
  talk "$(opt STRUCTURED)" "$(opt EXTENDED)" "$(ask GO)" READ,1,0,1 \
    FLUSH,2,0,0 99,3,0,0 DISC,0,0,0
  LONG=
  expect structured=ack extended=ack "go=export:65536:$(plus 0x80)" \
    'go=ack data.1@0=6e^0 none.2^0 !EINVAL.3^0'
}
testStructuredRepliesAfterExtendedHeadersAreRefused() {
  haggle 'extended=ack structured=extheader' "$(opt EXTENDED)" \
    "$(opt STRUCTURED)"
}
testExportNameAfterExtendedHeadersCloses() {
  LOG='gone: Protocol error$'
  talk "$(opt EXTENDED)" "$(opt EXPORT_NAME)" READ,1,0,1
  expect extended=ack
}
testExtendedHeadersAreEnoughForMetaContexts() {
  haggle 'extended=ack listmeta=base:allocation? listmeta=ack' \
    "$(opt EXTENDED)" "$(meta LIST_META '')"
}
testStatusPayloadsAreOfferedToWhoHasContexts() {
  haggle "extended=ack info=export:65536:$(printf %04x $((0x$FLAGS | 0x80)))
    info=ack setmeta=base:allocation? setmeta=ack
    info=export:65536:$(printf %04x $((0x$FLAGS | 0x1080))) info=ack
    info=export:65536:$(printf %04x $((0x$FLAGS | 0x80))) info=ack" \
    "$(opt EXTENDED)" "$(ask INFO)" "$(meta SET_META '' base:allocation)" \
    "$(ask INFO)" "$(ask INFO "$(of other)")"
}
testMetaContextsNeedStructuredReplies() {
  haggle 'setmeta=invalid listmeta=invalid' \
    "$(meta SET_META '' base:allocation)" "$(meta LIST_META '')"
}
testMetaContextsOfAnUnknownExportAreUnknown() {
  ARGS='-e known'
  haggle 'structured=ack setmeta=unknown listmeta=unknown' "$(opt STRUCTURED)" \
    "$(meta SET_META "$(of no)" base:allocation)" \
    "$(meta LIST_META "$(of no)")"
}
testSameQueryTwiceSelectsOnce() {
  haggle "$METAOK" "$(opt STRUCTURED)" \
    "$(meta SET_META '' base:allocation base:allocation)"
}
testSetWithWildcardOrUnknownQueriesSelectsNothing() {
  haggle 'structured=ack setmeta=ack setmeta=ack setmeta=ack setmeta=ack' \
    "$(opt STRUCTURED)" "$(meta SET_META '' base:)" \
    "$(meta SET_META '' x-foo:bar qemu:dirty-bitmap:x)" \
    "$(meta SET_META '' base:other base:allocationx)" "$(meta SET_META '')"
  haggle "$METAOK" "$(opt STRUCTURED)" \
    "$(meta SET_META '' x-foo:bar base:allocation base:)"
}
testListMetaWithoutQueriesListsAll() {
  haggle 'structured=ack listmeta=base:allocation? listmeta=ack' \
    "$(opt STRUCTURED)" "$(meta LIST_META '')"
}
testListMetaOfTheNamespaceListsIt() {
  haggle 'structured=ack listmeta=base:allocation? listmeta=ack' \
    "$(opt STRUCTURED)" "$(meta LIST_META '' base:)"
  haggle 'structured=ack listmeta=base:allocation? listmeta=ack listmeta=ack' \
    "$(opt STRUCTURED)" "$(meta LIST_META '' x-foo: base:allocation)" \
    "$(meta LIST_META '' x-foo:)"
}
testListMetaIgnoresWhatItDoesNotKnow() {
  haggle 'structured=ack listmeta=ack listmeta=ack listmeta=ack' \
    "$(opt STRUCTURED)" \
    "$(meta LIST_META '' base:other base:allocationx base:Allocation)" \
    "$(meta LIST_META '' qemu: nbd-server: x-base:allocation)" \
    "$(meta LIST_META '' "x-$(printf %04093d 0):")"
}
testQueriesWithoutANamespaceAreIgnoredOrInvalid() {
  for query in '' base allocation :allocation 'base: allocation'; do
    for option in LIST_META SET_META; do
      talk "$(opt STRUCTURED)" "$(meta $option '' "$query")" "$(opt ABORT)"
      case ${GOT#structured=ack } in
        listmeta=ack* | setmeta=ack*) ;;
        'listmeta=invalid abort=ack' | 'setmeta=invalid abort=ack') ;;
        *) fail "$option '$query': $GOT" ;;
      esac
    done
  done
}
# What BLOCK_STATUS says after these options
selected() {
  expected=$1
  shift
  talk "$(opt STRUCTURED)" "$@" STATUS_OF+REQ_ONE,1,0,512 DISC,0,0,0
  assertEquals "$expected" "${GOT##* }"
}
testEachSetReplacesTheSelection() {
  yes=$(meta SET_META '' base:allocation)
  selected status.1=base:allocation:512/0 "$yes" "$(ask GO)"
  selected status.1=base:allocation:512/0 "$yes" "$yes" "$(ask GO)"
  selected !EINVAL.1 "$yes" "$(meta SET_META '')" "$(ask GO)"
  selected !EINVAL.1 "$yes" "$(meta SET_META '' x-foo:bar)" "$(ask GO)"
}
testFailedSetSelectsNothing() {
  yes=$(meta SET_META '' base:allocation)
  selected !EINVAL.1 "$yes" "$(opt SET_META 00)" "$(ask GO)"
  ARGS='-e known'
  selected !EINVAL.1 "$yes" "$(meta SET_META "$(of no)" base:allocation)" \
    "$(ask GO)"
}
testListMetaKeepsTheSelection() {
  selected status.1=base:allocation:512/0 \
    "$(meta SET_META '' base:allocation)" "$(meta LIST_META '')" \
    "$(meta LIST_META '' x:)" "$(ask GO)"
}
testSetForAnotherExportSelectsNothing() {
  selected !EINVAL.1 "$(meta SET_META "$(of one)" base:allocation)" \
    "$(ask GO "$(of two)")"
  ARGS='a=mem:1K b=mem:1K'
  selected !EINVAL.1 "$(meta SET_META "$(of a)" base:allocation)" \
    "$(ask GO "$(of b)")"
}
testSetHoldsForTheNameThatWasGivenOnly() {
  ARGS='-e known'
  selected !EINVAL.1 "$(meta SET_META '' base:allocation)" \
    "$(ask GO "$(of known)")"
  selected !EINVAL.1 "$(meta SET_META "$(of known)" base:allocation)" \
    "$(ask GO)"
  ARGS=a=mem:1K DISK=b=$DISK
  selected status.1=base:allocation:512/0 \
    "$(meta SET_META "$(of a)" base:allocation)" \
    "$(meta SET_META "$(of b)" base:allocation)" "$(ask GO "$(of b)")"
}
testFailedOptionsKeepWhatWasNegotiated() {
  ARGS='-e known'
  selected status.1=base:allocation:512/0 \
    "$(meta SET_META "$(of known)" base:allocation)" "$(ask GO "$(of no)")" \
    "$(opt GO 00)" "$(opt STRUCTURED 00)" "$(opt STARTTLS)" \
    "$(ask INFO "$(of known)")" "$(ask GO "$(of known)")"
}
testSetBeforeStructuredRepliesSelectsNothing() {
  talk "$(meta SET_META '' base:allocation)" "$(opt STRUCTURED)" "$(ask GO)" \
    STATUS_OF,1,0,512 DISC,0,0,0
  expect setmeta=invalid structured=ack "go=export:65536:$(plus 0x80)" \
    'go=ack !EINVAL.1'
}
testSetHoldsForExportName() {
  selected status.1=base:allocation:512/0 \
    "$(meta SET_META '' base:allocation)" "$(opt EXPORT_NAME)"
}
testExportsThatAreOnlyAskedAboutAreGivenBack() { unit givenback; }
testAHostsContextsAreSelectedAndAnsweredEachForItself() { unit contexts; }
testSixteenContextsAtOnceAndNoMore() { unit manycontexts; }
testAReplyHas128KiExtentsAtMost() { unit manyextents; }
testInfoIsWhatAClientIsTold() { unit info; }
testGoAfterSetHasTheSizeOfThen() { unit resizedset; }
testLongStatusRepliesOfOneThreadDoNotGather() { unit onethread; }
testWhoSaysNothingHasTheTimeOfTheHandshake() { unit silent; }

# ==== [9] TRANSMISSION (@transmission) =======================================

testBadRequestMagicCloses() {
  LOG='^nbdserve: .*client'
  simple OK.1=6e READ,1,0,1 "25609514$(zeroes 24)" READ,2,0,1
  simple '' "67446698$(zeroes 24)" READ,2,0,1
}
testUnknownCommandIsEINVALAndInStep() {
  simple 'EINVAL.1 EINVAL.2 EINVAL.3 OK.4=6e' 8,1,0,4 0x7fff,2,-1,-1 \
    0xffff,3,0,1 READ,4,0,1
  structured '!EINVAL.1' 8,1,0,512
}
testUnknownFlagsOfAWriteAreEINVALAndItsPayloadSkipped() {
  simple 'EINVAL.1 EINVAL.2 OK.3=6e62' WRITE+0x400000,1,0,28 READ,9,0,1 \
    WRITE+NO_HOLE,2,0,1 58 READ,3,0,2
}
testUnknownCommandsAreEINVALWithChunksToo() {
  refused 'EINVAL.1 EINVAL.2 EINVAL.3' 8,1,0,512 0xffff,2,9,-1 99+FUA,3,0,0
}
testDfWithoutStructuredRepliesIsEINVAL() {
  simple EINVAL.1 READ+DF,1,0,1
}
testDfReadIsOneChunk() {
  structured data.1@0=6e626473657276 READ+DF,1,0,7
  truncate -s 128K "$DISK"
  SIZE=131072
  structured hole.1@60000+65536 READ+DF,1,60000,65536
}
testDfReadOfDataAndAHoleIsData() {
  printf x >"$DISK"
  truncate -s 64K "$DISK"
  structured "data.1@0=78$(zeroes 65535)" READ+DF,1,0,65536
  extended "data.1@0=78$(zeroes 65535)" READ+DF,1,0,65536
}
testLongReadsAreSeveralChunks() {
  truncate -s 0 "$DISK"
  truncate -s 3M "$DISK"
  head -c 1048576 /dev/zero | tr '\0' x |
    dd of="$DISK" bs=1M seek=1 conv=notrunc 2>/dev/null
  SIZE=3145728
  structured 'hole.1@0+1048576+ data.1@1048576=1048576x78+
    hole.1@2097152+1048576' READ,1,0,3145728
  extended 'hole.1@0+1048576^0+ data.1@1048576=1048576x78^0+
    hole.1@2097152+1048576^0' READ,1,0,3145728
}
testDfReadOverAMegabyteIsEOVERFLOW() {
  truncate -s 4M "$DISK"
  SIZE=4194304
  structured '!EOVERFLOW.1 data.2@0=6e' READ+DF,1,0,2097152 READ,2,0,1
}
testReadsAreAnsweredWithData() {
  simple 'OK.1=6e62647365727665 OK.2=65525x00 OK.3=00 OK.4=0a00' READ,1,0,8 \
    READ,2,11,65525 READ,3,65535,1 READ,4,8,2
}
testStructuredReadsAreChunks() {
  structured 'data.1@0=6e62647365727665 data.3@65535=00' READ,1,0,8 \
    READ,3,65535,1
}
testReadsOfNothingButZeroesAreHoles() {
  structured 'data.1@0=6e62647365727665 hole.2@512+1024 hole.3@4096+61440
    data.4@600=511x00 none.5' READ,1,0,8 READ,2,512,1024 READ,3,4096,61440 \
    READ,4,600,511 READ,5,0,0
  extended 'data.1@0=6e62647365727665^0 hole.2@512+1024^512
    hole.3@4096+61440^4096 none.5^0' READ,1,0,8 READ,2,512,1024 \
    READ,3,4096,61440 READ,5,0,0
  simple 'OK.1=6e62 OK.2=512x00' READ,1,0,2 READ,2,512,512
}
testHolesAmongDataLeaveEachReadItsOwnBytes() {
  for i in 1 3 4 8 12 13; do
    printf %s $i |
      dd of="$DISK" bs=1 seek=$((i * 4096)) conv=notrunc 2>/dev/null
  done
  structured "data.0@4096=31 data.1@4096=31$(zeroes 511) hole.2@8192+512
    data.3@12288=33$(zeroes 511) data.4@16384=34$(zeroes 511) hole.5@20480+512
    data.6@53248=3133$(zeroes 510)" READ,0,4096,1 READ,1,4096,512 \
    READ,2,8192,512 READ,3,12288,512 READ,4,16384,512 READ,5,20480,512 \
    READ,6,53248,512
}
testLongReadsAreCutAtMultiplesOf512() {
  truncate -s 0 "$DISK"
  truncate -s 4M "$DISK"
  talk "$META" "$(ask GO)" READ,1,1,4000000 DISC,0,0,0
  assertEquals 4000001 "$(echo "$GOT" | tr ' ' '\n' |
    sed -n 's/^hole.1@\([0-9]*\)+\([0-9]*\)+*$/\1 \2/p' | awk '
      NR > 1 && ($1 != end || $1 % 512) { print "chunk at " $1 " after " end }
      { end = $1 + $2 }
      END { print end }')"
}
testExtendedRepliesCarryTheRequestsOffset() {
  extended 'data.1@0=6e6264^0 none.2^100 data.3@100=61626364^100 none.4^7
    none.5^4096 none.6^8192 none.7^512 !EINVAL.8^9' READ,1,0,3 \
    WRITE+PAYLOAD,2,100,4 61626364 READ,3,100,4 FLUSH,4,7,0 \
    TRIM,5,4096,4096 ZEROES,6,8192,4096 CACHE,7,512,512 99,8,9,0
}
testExtendedWriteWithoutPayloadIsEINVALAndHasNone() {
  extended '!EINVAL.1^0 data.2@0=6e^0 none.3^0' WRITE,1,0,28 READ,2,0,1 \
    WRITE,3,0,0
}
testExtendedPayloadsWhereNoneBelongAreEINVALAndSkipped() {
  extended '!EINVAL.1^0 !EINVAL.2^0 !EINVAL.3^0 !EINVAL.4^0 !EINVAL.5^0
    data.6@0=6e^0' READ+PAYLOAD,1,0,32 READ,9,0,0 TRIM+PAYLOAD,2,0,3 616161 \
    ZEROES+PAYLOAD,3,0,200000 @200000 FLUSH+PAYLOAD,4,0,1 00 \
    99+PAYLOAD,5,0,2 0000 READ,6,0,1
  assertEquals 6e62 "$(at 0 2)"
  ARGS=-r FLAGS=$RO
  extended '!EINVAL.1 !EINVAL.2' TRIM+PAYLOAD,1,0,1 58 ZEROES+PAYLOAD,2,0,1 58
}
testPayloadFlagWithCompactHeadersIsEINVAL() {
  simple 'EINVAL.1 EINVAL.2 OK.3=6e' WRITE+PAYLOAD,1,0,28 READ,9,0,1 \
    READ+PAYLOAD,2,0,1 READ,3,0,1
  structured '!EINVAL.1' STATUS_OF+PAYLOAD,1,0,512
}
testExtendedPayloadOverTheMaximumCloses() {
  LOG='gone: Protocol error$'
  ARGS='-b 1:4096:4K' BLOCK=go=block:1:4096:4096
  extended '' WRITE+PAYLOAD,1,0,4097 @4097 READ,2,0,1
}
testCompactRequestWithExtendedHeadersCloses() {
  LOG='gone: Protocol error$'
  talk "$(opt EXTENDED)" "$(ask GO)" READ,1,0,1 00000000 READ,2,0,1
  expect extended=ack "go=export:65536:$(printf %04x $((0x$FLAGS | 0x80)))" \
    go=ack
}
testExtendedRequestWithCompactHeadersCloses() {
  LOG='gone: Protocol error$'
  LONG=1
  talk "$(ask GO)" READ,1,0,1 READ,2,0,1
  LONG=
  expect "go=export:65536:$FLAGS" go=ack
}
testExtendedRequestsReachBeyond4GiB() {
  unless POSIX_ONLY || return 0
  rm "$DISK"
  ARGS='--create 8T' SIZE=8796093022208
  extended 'none.1^4294967296 none.2^0 none.3^0 none.4^8589934592
    longstatus.5=base:allocation:8796093022208/3^0
    longstatus.6=base:allocation:8589934592/3^4096
    !EINVAL.7^1 !ENOSPC.8^4096 !EINVAL.9^18446744073709551616' \
    ZEROES,1,4294967296,6442450944 TRIM,2,0,8796093022208 \
    CACHE,3,0,6442450944 ZEROES+FAST,4,8589934592,8589934592 \
    STATUS_OF,5,0,8796093022208 STATUS_OF+REQ_ONE,6,4096,8589934592 \
    TRIM,7,1,8796093022208 ZEROES,8,4096,-1 TRIM,9,-1,-1
}
testExtendedLengthsAreNotCutTo32Bits() {
  rm "$DISK"
  ARGS='--create 8T' SIZE=8796093022208
  extended '!EINVAL.1 !EINVAL.2 !EINVAL.3 !EINVAL.4 !EINVAL.5 !EINVAL.6' \
    READ,1,0,4294967297 READ,2,-1,-1 READ+DF,3,0,4294967296 \
    WRITE,4,0,4294967297 CACHE,5,512,-512 STATUS_OF,6,4096,-4096
}
testExtendedPayloadOf4GiBCloses() {
  LOG='gone: Protocol error$'
  extended data.1@0=6e READ,1,0,1 WRITE+PAYLOAD,2,0,4294967297 58 READ,3,0,1
  assertEquals 6e "$(at 0 1)"
}
testExtendedStatusIsOf64Bits() {
  unless POSIX_ONLY || return 0
  echo | dd of="$DISK" bs=1 seek=32768 conv=notrunc 2>/dev/null
  extended 'longstatus.1=base:allocation:4096/0:28672/3:4096/0:28672/3^0
    longstatus.2=base:allocation:3096/0^1000' STATUS_OF,1,0,65536 \
    STATUS_OF+REQ_ONE,2,1000,64536
}
testStatusPayloadFiltersContexts() {
  extended 'longstatus.1=base:allocation:4096/0^0' \
    STATUS_OF+PAYLOAD+REQ_ONE,1,0,12 000000000000100000000001
}
testWrongStatusPayloadsAreEINVALAndSkipped() {
  extended '!EINVAL.1^0 !EINVAL.2^0 !EINVAL.3^0 !EINVAL.4^0 !EINVAL.5^0
    !EINVAL.6^0 !EINVAL.7^0 data.8@0=6e^0' \
    STATUS_OF+PAYLOAD,1,0,12 000000000000100000000002 \
    STATUS_OF+PAYLOAD,2,0,16 00000000000010000000000100000001 \
    STATUS_OF+PAYLOAD,3,0,8 0000000000001000 \
    STATUS_OF+PAYLOAD,4,0,11 0000000000001000000000 \
    STATUS_OF+PAYLOAD,5,0,200000 @200000 \
    STATUS_OF+PAYLOAD,6,0,12 000000000001000100000001 \
    STATUS_OF+PAYLOAD,7,0,0 READ,8,0,1
}
testStatusPayloadsWithoutContextsAreEINVALAndSkipped() {
  LONG=1
  talk "$(opt EXTENDED)" "$(ask GO)" STATUS_OF+PAYLOAD,1,0,12 \
    000000000000100000000001 STATUS_OF+PAYLOAD,2,0,200000 @200000 \
    STATUS_OF,3,0,512 READ,4,0,1 DISC,0,0,0
  LONG=
  expect extended=ack "go=export:65536:$(plus 0x80) go=ack" \
    '!EINVAL.1^0 !EINVAL.2^0 !EINVAL.3^0 data.4@0=6e^0'
}
testOffsetsNear2To64DoNotWrap() {
  for command in READ TRIM CACHE; do
    simple 'EINVAL.1 EINVAL.2 EINVAL.3' $command,1,-1,2 $command,2,-512,512 \
      $command,3,0x8000000000000000,1
  done
  simple 'ENOSPC.1 ENOSPC.2 ENOSPC.3 OK.4=6e' WRITE,1,-1,2 5858 \
    ZEROES,2,-512,512 ZEROES,3,-512,4096 READ,4,0,1
  simple 'ENOSPC.1 OK.2=6e' WRITE,1,-512,140000 @140000 READ,2,0,1
}
testRangesBeyondTheEndAreRefusedWithChunksToo() {
  refused 'EINVAL.1 ENOSPC.2 ENOSPC.3 EINVAL.4 EINVAL.5 ENOSPC.6 EINVAL.7' \
    READ,1,65535,2 WRITE,2,65535,2 6161 WRITE,3,-1,140000 @140000 \
    TRIM,4,65536,1 CACHE,5,-512,512 ZEROES,6,1,65536 STATUS_OF,7,65536,1
}
testZeroLengthRequestsSucceed() {
  simple 'OK.1 OK.2 OK.3 OK.4 OK.5 OK.6=6e' READ,1,0,0 WRITE,2,0,0 TRIM,3,0,0 \
    CACHE,4,0,0 ZEROES,5,0,0 READ,6,0,1
  structured 'none.1 OK.2' READ,1,0,0 WRITE,2,0,0
}
testZeroLengthRequestsSucceedWithChunksToo() {
  structured 'none.1 none.2 OK.3 OK.4 OK.5 OK.6' READ,1,0,0 READ+DF,2,65536,0 \
    WRITE,3,0,0 TRIM,4,0,0 CACHE,5,0,0 ZEROES,6,0,0
  extended 'none.1^0 none.2^65536 none.3^0 none.4^0 none.5^0 none.6^0' \
    READ,1,0,0 READ+DF,2,65536,0 WRITE+PAYLOAD,3,0,0 TRIM,4,0,0 CACHE,5,0,0 \
    ZEROES,6,0,0
}
testZeroLengthBlockStatusIsAnswered() {
  talk "$META" "$(ask GO)" STATUS_OF,1,0,0 READ,2,0,1 DISC,0,0,0
  case $GOT in
    *'go=ack '*.1*' data.2@0=6e') ;;
    *) fail "$GOT" ;;
  esac
}
testReadOverTheMaximumIsEINVAL() {
  rm "$DISK"
  ARGS='--create 1G' SIZE=1073741824
  simple 'EINVAL.1 OK.2=00' READ,1,0,33554433 READ,2,0,1
  ARGS='-b 1:4096:64K' BLOCK=go=block:1:4096:65536
  simple 'EINVAL.1 OK.2=65536x00' READ,1,0,65537 READ,2,0,65536
  structured '!EINVAL.1' READ,1,0,65537
}
testWriteOverTheMaximumIsEINVALAndInStep() {
  ARGS='-b 1:4096:4K' BLOCK=go=block:1:4096:4096
  simple 'EINVAL.1 OK.2=6e' WRITE,1,0,4097 @4097 READ,2,0,1
  rm "$DISK"
  ARGS='--create 1G' SIZE=1073741824 BLOCK=
  simple 'EINVAL.1 OK.2=00' WRITE,1,0,33554433 @33554433 READ,2,0,1
  rm "$W/corpus/$NTALK"
}
testWriteOver64MiBCloses() {
  LOG='^nbdserve: .*client'
  rm "$DISK"
  ARGS='--create 1G' SIZE=1073741824
  simple OK.1=00 READ,1,0,1 WRITE,2,0,67108865
  simple '' WRITE,2,0,-1
}
testTrimAndZeroOverTheMaximumWork() {
  rm "$DISK"
  SIZE=3221225472 BLOCK=go=block:1:4096:65536
  [ "$SWITCH" != POSIX_ONLY ] || SIZE=100663296 # all of it is written
  ARGS="--create $SIZE -b 1:4096:64K"
  structured 'OK.1 OK.2 OK.3' TRIM,1,0,$SIZE ZEROES,2,0,$SIZE CACHE,3,0,$SIZE
}
testFlushIgnoresItsRange() {
  simple 'OK.1 OK.2 OK.3' FLUSH,1,0,0 FLUSH,2,4096,512 FLUSH,3,-1,-1
}
testCookiesAreOpaqueAndMayRepeat() {
  for cookie in 0000000000000000 ffffffffffffffff 6744669825609513; do
    flush=2560951300000003$cookie$(zeroes 12)
    talk "$(ask GO)" "$flush" "$flush" "$flush" DISC,0,0,0
    ok=6744669800000000$cookie
    assertEquals "$ok$ok$ok" "$(tail -c 48 "$T/out" | hex)"
    read=2560951300000000$cookie$(zeroes 11)01 unknown=2560951300000099$cookie
    talk "$META" "$(ask GO)" "$read" DISC,0,0,0
    assertEquals "668e33ef00010001${cookie}00000009$(zeroes 8)6e" \
      "$(tail -c 29 "$T/out" | hex)"
    talk "$META" "$(ask GO)" "$unknown$(zeroes 12)" DISC,0,0,0
    assertContains "$(hex <"$T/out")" "668e33ef00018001$cookie"
  done
}
testUnalignedRequestsAreEINVALWithAMinimumBlock() {
  ARGS='-b 512:4096:1M'
  talk "$(ask GO '' 3)" READ,1,1,512 READ,2,0,1 WRITE,3,512,511 @511 \
    WRITE,4,511,512 @512 ZEROES,5,0,100 TRIM,6,100,512 CACHE,7,0,1 \
    WRITE,8,512,512 @512 DISC,0,0,0
  assertEquals 'EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 EINVAL.5 EINVAL.6 EINVAL.7'\
' OK.8' "${GOT#*go=ack }"
}
testUnalignedRequestsAreEINVALWithChunksToo() {
  ARGS='-b 512:4096:1M' INFOS=3 BLOCK=go=block:512:4096:1048576
  refused 'EINVAL.1 EINVAL.2 EINVAL.3 EINVAL.4 EINVAL.5 EINVAL.6 EINVAL.7
    EINVAL.8 EINVAL.9' READ,1,1,512 READ,2,0,1 WRITE,3,512,511 @511 \
    WRITE,4,511,512 @512 ZEROES,5,0,100 TRIM,6,100,512 CACHE,7,0,1 \
    STATUS_OF,8,0,100 STATUS_OF,9,256,512
  assertEquals 6e62 "$(at 0 2)"
  structured 'hole.1@512+512 OK.2 OK.3' READ,1,512,512 WRITE,2,65024,512 @512 \
    TRIM,3,0,512
}
testBlockStatusWithoutAContextIsEINVAL() {
  simple EINVAL.1 STATUS_OF,1,0,512
  talk "$(opt STRUCTURED)" "$(ask GO)" STATUS_OF,1,0,512 READ,2,0,1 DISC,0,0,0
  assertEquals '!EINVAL.1 data.2@0=6e' "${GOT#*go=ack }"
}
testExtentsAreMultiplesOfTheMinimumBlock() {
  filled || return 0
  truncate -s 0 "$DISK"
  truncate -s 256K "$DISK"
  echo | dd of="$DISK" bs=1 seek=69632 conv=notrunc 2>/dev/null
  SIZE=262144 ARGS='-b 65536:65536:1M' INFOS=3
  BLOCK=go=block:65536:65536:1048576
  s=base:allocation:
  structured "status.1=${s}65536/3:65536/0:131072/3 status.2=${s}65536/0
    status.3=${s}65536/3" STATUS_OF,1,0,262144 \
    STATUS_OF+REQ_ONE,2,65536,131072 STATUS_OF,3,131072,65536
  extended "longstatus.1=${s}65536/3:65536/0:131072/3" STATUS_OF,1,0,262144
}
testStatusIsNoLongerThanTheMaximumPayload() {
  filled || return 0
  truncate -s 0 "$DISK"
  awk 'BEGIN { for (i = 0; i < 140; i++) printf "%04096d", i % 2 }' |
    tr 0 '\0' | dd of="$DISK" bs=4096 conv=sparse 2>/dev/null
  ARGS='-b 1:512:512'
  for mode in STRUCTURED EXTENDED; do
    [ $mode = STRUCTURED ] || LONG=1
    talk "$(opt $mode)" "$(meta SET_META '' base:allocation)" "$(ask GO)" \
      STATUS_OF,1,0,573440 DISC,0,0,0
    LONG=
    n=$(echo "$GOT" | tr -cd / | wc -c) # extents, of 8 or 16 bytes
    assertTrue "$n with $mode" "[ $n -gt 1 ] && \
      [ $((n * (${#mode} == 8 ? 16 : 8))) -le 512 ]"
  done
}
testRequestsBeforeADisconnectAreAnswered() {
  simple 'OK.1=6e OK.2 OK.3=62 OK.4 OK.5' READ,1,0,1 WRITE,2,9,1 61 READ,3,1,1 \
    FLUSH,4,0,0 TRIM,5,4096,4096
}
testDisconnectsWithFlagsOrARangeAreOnes() {
  simple OK.1=6e READ,1,0,1 DISC+FUA+FAST,7,8,9 READ,2,0,1
  extended data.1@0=6e READ,1,0,1 DISC+0x80000000,7,-1,-1 READ,2,0,1
}
testNothingIsReadBehindADisconnect() {
  talk "$(ask GO)" DISC,0,0,0 WRITE,1,0,1 58
  expect 'go=export:65536:0d6d go=ack'
  assertEquals 6e "$(at 0 1)"
}
# Random requests (SEED) over disjoint regions, whose replies may come in any
# order.  They must find a reply that is missing, double, of another request or
# with another one's bytes: a slip that hits one request in a thousand is found
# in every run, as there are 64 times 256 of them in three phases.
testManyPipelinedRequestsOverManyConnections() {
  unless NO_THREADS || return 0
  truncate -s 64M "$DISK"
  serve "$DISK"
  client pipeline "$SOCK" 64 256
}
testMixedRequestsGetTheirOneAnswer() { unit mixed; }
testManyPipelinedRequestsToMemory() {
  unless NO_THREADS || return 0
  serve mem:64M
  client pipeline "$SOCK" 16 1000
}
testManyPipelinedRequestsOneAtATime() {
  unless NO_THREADS || return 0
  truncate -s 64M "$DISK"
  serve -t 1 "$DISK"
  client pipeline "$SOCK" 4 256
}
testLargeReadsShareTheMemory() {
  truncate -s 64M "$DISK"
  serve "$DISK"
  client large "$SOCK" 12
}
# READs of a file from 32 KiB on go to the socket without a copy
testLongReadsWithoutACopyAreRight() {
  unless NO_FLAT && needs nbdcopy python3 || return 0
  noise 5000000 >"$T/a"
  truncate -s 7000000 "$T/a" # a hole
  noise 3000000 >>"$T/a"
  serve -r "$T/a"
  for n in 32768 65536 131072 262144 1048576 4194304; do
    does nbdcopy --request-size=$n --requests=8 "$(uri)" "$T/out"
    assertTrue "requests of $n bytes" "cmp '$T/a' '$T/out'"
  done
  serve -r -o 517 "$T/a" # parts of pages
  does nbdcopy --request-size=1048576 "$(uri)" "$T/out"
  assertTrue 'from byte 517 on' "cmp -i 517:0 '$T/a' '$T/out'"
  # Over a unix socket there is a pipe for them; over TCP a copy is faster.
  [ -e /proc/self/fd ] && has_nbdsh || return 0
  [ "$SWITCH" != POSIX_ONLY ] && unless NO_TCP || return 0
  for how in "-U $T/l" '-p 0'; do
    # shellcheck disable=SC2086
    start -r $how "$T/a"
    nbd_python <<END
import os
def pipes():
    d = "/proc/$PID/fd/"
    return sum("pipe:" in os.readlink(d + f) for f in os.listdir(d))
h.connect_uri(uri)
h.pread(16384, 0)
before = pipes()
assert len(h.pread(32768, 0)) == 32768
print("pipes", pipes() - before)
END
    case $how in -p*) n=0 ;; *) n=2 ;; esac
    assertEquals "$how" "pipes $n" "$(cat "$T/log")"
  done
}
testWhoTakesNoLongReadsIsCutOffAndWhoIsSlowIsNot() {
  unhurried && unless NO_FLAT && needs python3 || return 0
  noise 4194304 >"$T/a"
  LOG='^nbdserve: .*client .*timed out'
  serve --stall 3 -r "$T/a"
  cat >"$T/reader.py" <<'END'
import socket, struct, sys, time
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    s.recv(18, socket.MSG_WAITALL)
    s.sendall(struct.pack(">IQII", 3, 0x49484156454f5054, 1, 0))
    s.recv(10, socket.MSG_WAITALL)
    for i in range(32):
        s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, i,
                              i % 4 << 20, 1 << 20))
    return s
data = open(sys.argv[2], "rb").read()
never, slow = connect(), connect()
for i in range(32): # for some of them a quarter of the time that there is
    head = slow.recv(16, socket.MSG_WAITALL)
    assert head == struct.pack(">IIQ", 0x67446698, 0, i)
    got = b""
    while len(got) < 1 << 20:
        got += slow.recv(min(65536, (1 << 20) - len(got)))
        if i % 8 == 0: time.sleep(0.05)
    assert got == data[(i % 4) << 20:(i % 4 + 1) << 20], i
time.sleep(3)
left = n = 1
while n: # what the socket has, and then its end
    try: n = len(never.recv(1 << 20))
    except ConnectionResetError: n = 0 # requests were left unread
    left += n
assert left < 16 << 20, left
END
  does python3 "$T/reader.py" "$SOCK" "$T/a"
}
testLongReadThatFailsHalfwayIsAnErrorInStep() {
  LOG='^nbdserve: .*client'
  noise 8388608 >"$DISK"
  serve "$DISK"
  client half "$SOCK" "$DISK"
}
testNoReplyComesInsideTheDataOfALongRead() {
  truncate -s 16M "$DISK"
  serve "$DISK"
  client mixed "$SOCK"
}
testReadsWithoutACopyAreAnsweredInTheirTurn() {
  noise 16777216 >"$DISK"
  serve "$DISK"
  client turns "$SOCK"
}
testNoReplyComesInsideTheDataOfALoneRead() {
  LOG='^nbdserve: .*client'
  truncate -s 16M "$DISK"
  serve "$DISK"
  client lone "$SOCK"
}
testBackendIsCalledFromManyThreads() { unit parallel; }
testSlowCallHoldsNobodyUp() { unit slow; }
testLeavingClientGetsItsAnswers() { unit leave; }
testClientsThatVanishInAWriteLeaveNothingBehind() { unit cut; }
testTransmissionCanBeEnteredAtOnce() { unit direct; }
testRequestsBeyondTheMemoryAreDone() { unit memory; }
testSlowFlushTrimOrReadHoldsNoReadsUp() { fault slow "$DISK"; }
testWhatCameFirstIsAnsweredWhileTheRestIsDone() { fault half "$DISK"; }
testReadsThatWaitForTheMediumAreAskedForAtOnce() {
  unless NO_THREADS || return 0
  fault awayreads "$DISK"
}
testFlushThatIsAnnouncedSlowlyHoldsNothingUp() {
  unless NO_THREADS || return 0
  unit slowbefore
}
testWhoseReaderHasHungUpIsNotWaitedFor() { unit hangup; }
testNothingIsReadForAClientThatIsGone() {
  unless NO_THREADS || return 0
  fault goneawayreads "$DISK"
}
testLongSimpleReplyIsInOnePiece() { fault whole "$DISK"; }
testLongWriteThatFailsHalfwayIsOneError() { fault halfway "$DISK"; }
testMemoryRefusedIsNoCrash() { fault memory "$DISK"; }
# Each allocation of a session once (under a sanitizer a part of them): what was
# answered is there, nothing leaks, and the next attempt succeeds
starved() { # fault VERB FILE
  unhurried || return 0
  case ${SANITIZER-} in '') step=1 ;; thread) step=11 ;; *) step=4 ;; esac
  fault "$@" $step
}
testASessionThatLacksMemoryOnceGoesOn() { starved starved "$DISK"; }
testASessionWithAStoreThatLacksMemoryOnceGoesOn() {
  unless NO_CAS || return 0
  starved starvedstore "$T/pool"
}
testRepliesAreGatheredOnceEachInOrder() { unit gather; }
testAClientHoldsNoMoreWritesThanThereAreThreads() { unit fullhands; }

# ==== [10] FLAT (@flat) ======================================================

testMissingFileIsNamed() {
  run -s "$T/absent"
  assertEquals 1 "$STATUS"
  says "$T/absent: .*o such file"
}
testDirectoryIsRefused() {
  run -s "$T"
  assertEquals 1 "$STATUS"
  says "$T: .*irectory"
}
testCharacterDeviceIsRefused() {
  run -s /dev/null
  assertEquals 1 "$STATUS"
  says '/dev/null: '
}
testCreateMakesASparseFile() {
  run -s --create 40M "$T/new"
  assertEquals 0 "$STATUS"
  assertEquals 41943040 "$(wc -c <"$T/new")"
  assertTrue "[ $(du -k "$T/new" | cut -f1) -lt 1000 ]"
}
testCreateKeepsAnExistingFile() {
  cp "$DISK" "$T/copy"
  run -s --create 40M "$DISK"
  assertEquals 0 "$STATUS"
  assertTrue 'unchanged' "cmp '$DISK' '$T/copy'"
}
testCreateGivesAnEmptyFileItsSize() {
  : >"$T/empty"
  run -s --create 40M "$T/empty"
  assertEquals 0 "$STATUS"
  assertEquals 41943040 "$(wc -c <"$T/empty")"
}
testReadOnlyFileIsServedWithR() {
  chmod 444 "$DISK"
  ARGS=-r FLAGS=$RO
  simple OK.1=6e62 READ,1,0,2
  [ "$(id -u)" != 0 ] || return 0 # root may write to it
  run -s "$DISK"
  assertEquals 1 "$STATUS"
  says "$DISK: .*ermission denied.*-r"
}
testSecondServerOfAFileExits4() {
  serve "$DISK"
  run -s "$DISK"
  assertEquals 4 "$STATUS"
  says "$DISK: "
  stop TERM
  run -s "$DISK"
  assertEquals 'after the first' 0 "$STATUS"
}
testTwoTargetsThatAreOneFileAreRefused() {
  ln "$DISK" "$T/link"
  run -U "$T/s" "$DISK" "$T/link"
  assertEquals 4 "$STATUS"
  says "$T/link: "
}
testSliceIsServedAlone() {
  printf aaaabbbbcccc >"$DISK"
  ARGS='-o 4 --size 4' SIZE=4
  simple 'OK.1=62626262 ENOSPC.2' READ,1,0,4 WRITE,2,2,4 @4
  simple OK.1 WRITE,1,1,2 5858
  assertEquals aaaabXXbcccc "$(cat "$DISK")"
  ARGS='-o 8' SIZE=4
  simple OK.1=63 READ,1,3,1
  run -s -o 13 "$DISK"
  assertEquals 1 "$STATUS"
  says "$DISK: "
  run -s -o 4 --size 9 "$DISK"
  assertEquals 1 "$STATUS"
  says "$DISK: "
}
testTemporaryWritesLeaveTheTargetAlone() {
  chmod 444 "$DISK"
  cp "$DISK" "$T/copy"
  ARGS=-T
  simple 'OK.1 OK.2' WRITE,1,2,2 6162 FLUSH,2,0,0
  ARGS='-T -t 1'
  talk "$(ask GO '')" WRITE,1,2,2 6162 READ,2,0,6 DISC,0,0,0
  expect "go=export:$SIZE:$FLAGS go=ack" 'OK.1 OK.2=6e6261626572'
  assertTrue 'changed' "cmp '$DISK' '$T/copy'"
  run -s -T mem:1M
  assertEquals 'mem:' 0 "$STATUS"
  run -s -T -r "$DISK"
  assertEquals 'and -r' 2 "$STATUS"
  says 'not together'
  run -s -T --create 1M "$T/new"
  assertEquals 'and --create' 2 "$STATUS"
  says 'not together'
  run -s -T "$T/absent"
  assertEquals 'no file' 1 "$STATUS"
  says "$T/absent: No such file or directory\$"
  TMPDIR=$T/none
  export TMPDIR
  run -s -T "$DISK"
  unset TMPDIR
  assertEquals 'no TMPDIR' 1 "$STATUS"
  says "$T/none: No such file or directory .*TMPDIR"
}
testFileSizeLimitIsENOSPC() {
  LOG='^nbdserve: .*client 1: NBD_CMD_WRITE .*too large'
  got=$(
    ulimit -f 16
    simple 'ENOSPC.1 OK.2' WRITE,1,32768,4 61616161 FLUSH,2,0,0
  )
  assertEquals '' "$got"
}
testWritesAreInTheFile() {
  simple 'OK.1 OK.2 OK.3' WRITE,1,0,4 61626364 WRITE+FUA,2,65535,1 7a \
    WRITE,3,4095,3 787878
  assertEquals 6162636465 "$(at 0 5)"
  assertEquals 007a "$(at 65534 9)"
  assertEquals 0078787800 "$(at 4094 5)"
}
testNewClientsSeeTheSizeThatAFileHasNow() {
  serve "$DISK"
  for size in 65536 100000 512 70000; do
    truncate -s $size "$DISK"
    client hello "$SOCK"
    assertEquals $size "$(cat "$T/log")"
  done
  stop TERM
  serve --offset 1000 --size 2000 "$DISK"
  truncate -s 200000 "$DISK"
  client hello "$SOCK"
  assertEquals 2000 "$(cat "$T/log")"
}
testTemporaryDiskKeepsItsSize() {
  needs nbdinfo || return 0
  unless NO_THREADS || return 0
  for size in 0 64K; do
    truncate -s $size "$DISK"
    serve -T "$DISK"
    truncate -s 10M "$DISK"
    assertEquals $((${size%K} * 1024)) "$(nbdinfo --size "$URI" 2>&1)"
  done
}
testTheLastOddBytesAreServed() {
  truncate -s 1000001 "$DISK"
  SIZE=1000001
  simple 'OK.1=00 EINVAL.2 ENOSPC.3' READ,1,1000000,1 READ,2,1000000,2 \
    WRITE,3,1000000,2 6161
  simple 'OK.1 OK.2' WRITE,1,1000000,1 61 ZEROES,2,999000,1000
  assertEquals 0061 "$(at 999999 9)"
  assertEquals 1000001 "$(wc -c <"$DISK")"
}
testAnEmptyFileIsServed() {
  : >"$DISK"
  SIZE=0
  simple 'EINVAL.1 ENOSPC.2 OK.3' READ,1,0,1 WRITE,2,0,1 61 FLUSH,3,0,0
}
testWriteZeroesReadsAsZeroes() {
  for flags in 0 NO_HOLE FUA NO_HOLE+FUA; do
    echo nbdserve >"$DISK"
    truncate -s 64K "$DISK"
    simple OK.1 ZEROES+$flags,1,2,3
    assertEquals 6e620000007276650a "$(at 0 9)"
  done
}
testFastZeroIsZeroOrENOTSUP() {
  talk "$(ask GO)" ZEROES+FAST,1,0,4096 DISC,0,0,0
  case $GOT in
    *' OK.1') assertEquals 0000 "$(at 0 2)" ;;
    *' ENOTSUP.1') assertEquals 6e "$(at 0 1)" ;;
    *) fail "$GOT" ;;
  esac
}
testFastZeroWithOtherFlagsIsZeroOrENOTSUP() {
  for flags in FAST+NO_HOLE FAST+FUA FAST+FUA+NO_HOLE; do
    echo nbdserve >"$DISK"
    truncate -s 64K "$DISK"
    talk "$(opt STRUCTURED)" "$(ask GO)" ZEROES+$flags,1,0,4096 DISC,0,0,0
    case $GOT in
      *' OK.1' | *' none.1') assertEquals 0000 "$(at 0 2)" ;;
      *' !ENOTSUP.1') assertEquals 6e62 "$(at 0 2)" ;;
      *) fail "$flags: $GOT" ;;
    esac
  done
}
testTrimFreesSpace() {
  filled || return 0
  simple OK.1 TRIM,1,0,524288
  assertTrue "$full to $(blocks)" "[ $(blocks) -le $((full - 500)) ]"
  assertEquals 78 "$(at 524288 1)"
}
testWriteZeroesMayFreeSpaceAndNoHoleDoesNot() {
  filled || return 0
  simple OK.1 ZEROES+NO_HOLE,1,0,1048576
  assertTrue "$full to $(blocks)" "[ $(blocks) -ge 1024 ]"
  assertEquals 00 "$(at 0 1)"
  truncate -s 0 "$DISK"
  truncate -s 1M "$DISK"
  simple OK.1 ZEROES+NO_HOLE,1,0,1048576
  assertTrue "hole to $(blocks)" "[ $(blocks) -ge 1024 ]"
}
testBlockStatusTellsDataFromHoles() {
  filled || return 0
  mv "$DISK" "$T/x"
  truncate -s 3M "$DISK"
  dd if="$T/x" of="$DISK" bs=1M seek=1 conv=notrunc 2>/dev/null
  SIZE=3145728
  s=base:allocation:
  structured "status.1=${s}1048576/3:1048576/0:1048576/3
    status.2=${s}1048576/3 status.3=${s}4096/3:4096/0 status.4=${s}100/0" \
    STATUS_OF,1,0,3145728 STATUS_OF+REQ_ONE,2,0,3145728 \
    STATUS_OF,3,1044480,8192 STATUS_OF+REQ_ONE,4,2097052,512
}
testBlockDeviceTakesUnalignedRequests() {
  needs losetup root /sys/block || return 0
  filled || return 0
  DISK=$(losetup -f --show "$DISK" 2>/dev/null)
  if [ -z "$DISK" ]; then skip 'no loop devices here'; return 0; fi
  # ROTATIONAL is what the kernel says of the device
  slow=$(cat "/sys/block/${DISK#/dev/}/queue/rotational")
  FLAGS=$(printf %04x $((0x$FLAGS | slow << 4)))
  simple 'OK.1 OK.2 OK.3 OK.4 OK.5=78' ZEROES,1,100,1000 \
    ZEROES+NO_HOLE,2,2000,3 TRIM,3,10001,5001 WRITE,4,5,1 61 READ,5,4,1
  assertEquals 780000787800000078 "$(at 99 2)$(at 1099 2)$(at 1999 5)"
  losetup -d "$DISK"
}
testCacheModes() {
  for mode in writeback writethrough unsafe; do
    ARGS="--cache $mode"
    simple 'OK.1 OK.2' WRITE,1,0,1 58 FLUSH,2,0,0
  done
}
testLongReadsOfAShrunkFileAreEIO() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .*client'
  truncate -s 4M "$DISK"
  serve "$DISK"
  client shrunk "$SOCK" "$DISK"
}
testWhatAShrunkFileLostIsNoHole() {
  LOG='^nbdserve: .*client'
  noise 1048576 >"$DISK"
  serve -r "$DISK"
  client lost "$SOCK" "$DISK"
}
testReadsOfAnyLengthAreTheFilesBytes() {
  noise 7000003 >"$DISK"
  serve -o 12345 "$DISK"
  client compare "$SOCK" "$DISK" 12345
}
testDurableWritesSurviveKILL() {
  truncate -s 1M "$DISK"
  serve "$DISK"
  client acked "$SOCK" "$DISK" "$PID" 9 100 fua
  stop KILL
}
# 1,200 random reads, writes and zeroes (SEED), compared with a copy in memory.
# They must find a byte of the target where the overlay's belongs, or the other
# way round, at the edge of a block: each kind of edge comes up dozens of times.
testTemporaryWritesDoNotReachTheFile() { unit temporary; }
testReadErrorBelowTemporaryWritesIsOneOfTheRequest() { unit overerror; }
testFailedSyncFailsAllLaterWrites() { fault sync "$DISK"; }
testEachWriteWithFuaIsSynced() { fault fua "$DISK"; }
testShrunkFileIsEIO() { fault shrunk "$DISK"; }
testDiskFullIsENOSPCAndPasses() { fault full "$DISK"; }
testReadErrorIsEIO() { fault read "$DISK"; }

# Tests for [4] and [10] of nbdserve.c.  The shell functions go to the group of
# [10] FLAT; the C parts into the section "//== fault", where it says so.

# ---- shell ----

# The program built for 32 bits: $W/nbdserve32
build32() {
  needs i686-linux-gnu-gcc || return 1
  if [ ! -e "$W/32.log" ]; then
    i686-linux-gnu-gcc -static -O1 -o "$W/nbdserve32" "$here/nbdserve.c" \
      -lpthread >"$W/32.log" 2>&1
  fi
  [ -x "$W/nbdserve32" ] || { fail "$(head -n 5 "$W/32.log")"; return 1; }
  "$W/nbdserve32" --version >"$T/log" 2>&1 ||
    { skip 'no 32-bit programs run here'; return 1; }
}

# Sizes of 64 bits are not cut to size_t
testTemporaryMapThatDoesNotFitInto32BitsIsRefused() {
  [ -z "$SWITCH$SANITIZER" ] || { skip 'another build'; return 0; }
  build32 || return 0
  NBDSERVE64=$NBDSERVE NBDSERVE=$W/nbdserve32
  for size in 4E 2097152G 3000000G; do # maps of 8 TiB, 4 GiB and 5.7 GiB
    run -s -T "mem:$size"
    assertEquals "$size" 1 "$STATUS"
    says "mem:$size: File too large"
  done
  DISK=mem:1T SIZE=1099511627776 ARGS=-T # one of 2 MiB is no problem
  simple 'OK.1 OK.2=6162' WRITE,1,1099511627774,2 6162 READ,2,1099511627774,2
  NBDSERVE=$NBDSERVE64
}

testMapOfATemporaryExportIsNeverCut() { unit maplen; }
# All commands count from --offset: a TRIM or zeroes elsewhere would destroy
# another part of the disk
testCommandsOnASliceStayInsideIt() {
  filled || return 0
  cp "$DISK" "$T/copy"
  ARGS='-o 64K --size 64K' SIZE=65536
  structured OK.1 TRIM,1,32768,8192
  structured 'status.1=base:allocation:32768/0:8192/3:24576/0' \
    STATUS_OF,1,0,65536
  simple 'OK.1 OK.2 OK.3 OK.4' ZEROES,1,4096,4096 ZEROES+NO_HOLE,2,12288,100 \
    WRITE,3,65535,1 61 CACHE,4,0,65536
  for range in 98304:8192 69632:4096 77824:100; do
    head -c "${range#*:}" /dev/zero | dd of="$T/copy" bs=1 \
      seek="${range%:*}" conv=notrunc 2>/dev/null
  done
  printf a | dd of="$T/copy" bs=1 seek=131071 conv=notrunc 2>/dev/null
  assertTrue 'what else changed' "cmp '$T/copy' '$DISK'"
}
testSliceNeverReachesBeyondWhatOffsetsHold() { unit slice; }

testReadOnlyDeviceIsServedOnlyWithR() {
  needs losetup || return 0
  filled || return 0
  device=$(losetup -r -f --show "$DISK" 2>/dev/null)
  if [ -z "$device" ]; then skip 'no loop devices here'; return 0; fi
  DISK=$device
  run -s "$DISK"
  assertEquals 1 "$STATUS"
  says "$DISK: Read-only file system"
  slow=$(cat "/sys/block/${DISK#/dev/}/queue/rotational")
  writable=$(printf %04x $((0x$FLAGS | slow << 4)))
  ARGS=-r FLAGS=$(printf %04x $((0x$RO | slow << 4)))
  simple OK.1=78 READ,1,0,1
  ARGS=-T FLAGS=$writable
  talk "$(ask GO '')" WRITE,1,0,1 61 READ,2,0,2 DISC,0,0,0
  expect "go=export:$SIZE:$FLAGS go=ack" 'OK.1 OK.2=6178'
  losetup -d "$device"
}
testReadOnlyDeviceIsEROFS() { fault readonly "$DISK"; }

testCreateThatFailsLeavesNoFile() {
  (
    ulimit -f 100 || exit
    run -s --create 40M "$T/new"
    echo "$STATUS" >"$T/status"
  ) 2>/dev/null
  assertEquals 1 "$(cat "$T/status")"
  says "$T/new: File too large"
  assertFalse 'left behind' "[ -e '$T/new' ]"
  run -s --create 9223372036854775807 "$T/new" # above what ext4, tmpfs hold
  if [ "$STATUS" != 0 ]; then
    says "$T/new: "
    assertFalse 'left behind' "[ -e '$T/new' ]"
  fi
  rm -f "$T/new"
  run -s --create 64K --offset 1M "$T/new"
  assertEquals 1 "$STATUS"
  says "$T/new: "
  assertFalse 'left behind with a bad offset' "[ -e '$T/new' ]"
}
testCreateThatFailsKeepsWhatWasThere() {
  : >"$T/empty"
  (
    ulimit -f 100 || exit
    run -s --create 40M "$T/empty"
    echo "$STATUS" >"$T/status"
  ) 2>/dev/null
  assertEquals 1 "$(cat "$T/status")"
  says "$T/empty: "
  assertTrue 'removed' "[ -f '$T/empty' ]"
  run -s --create 64K --offset 1M "$DISK"
  assertEquals 1 "$STATUS"
  says "$DISK: "
  assertTrue 'removed' "[ -f '$DISK' ]"
}
testCreateFollowsNoLinkToNowhere() {
  ln -s "$T/elsewhere" "$T/link"
  run -s --create 40M "$T/link"
  assertEquals 1 "$STATUS"
  says "$T/link: No such file or directory"
  assertFalse 'made' "[ -e '$T/elsewhere' ]"
  assertTrue 'the link stays' "[ -L '$T/link' ]"
  ln -sf "$DISK" "$T/link" # one that leads somewhere is followed
  run -s --create 40M "$T/link"
  assertEquals 0 "$STATUS"
}
testCreateThatCannotBeSyncedLeavesNoFile() { fault create "$DISK"; }
testAfterAFailedSyncNeighbouringWritesFail() { fault syncrun "$DISK"; }
testSlowReadOfATemporaryExportHoldsNobodyUp() {
  unless NO_THREADS || return 0
  fault overlay "$DISK"
}
testTemporaryFilesNeverHaveAName() { fault nameless "$DISK"; }
testTemporaryExportsLeaveNoDescriptor() { unit closed; }

# ---- C ----
# What follows a line "//== fault" goes to "//== fault": 1 in front of "#undef
# pread", 2 behind the other #defines there, 3 in front of main, 4 into main's
# chain.  "//== unit" 1 goes to "//== unit" behind u_overerror, 2 into verbs[].

# ==== [11] CLIENT (@peer) ====================================================

testPullGetsASealedSnapshotFromAnotherStore() {
  pulls || return 0
  S=$T/store
  noise 3000000 >"$T/in"
  cas 0 init "$S"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@s"
  cas 0 init "$T/other"
  cas 1 pull "$T/other::w@s" v@s -- "$NBDSERVE" -s "$S::"
  says 'v@s/pull: .*only what is sealed'
  cas 0 seal "$S::v@s"
  id=$(cat "$T/out")
  cas 0 pull "$T/other::w@s" v@s -- "$NBDSERVE" -s "$S::"
  assertEquals "$id" "$(cat "$T/out")"
  cas 0 verify "$T/other"
  S=$T/other
  same w "$T/in"
  same w@s "$T/in"
  cas 0 pull "$S::w@s" v@s -- "$NBDSERVE" -s "$T/store::"
  assertEquals 'it is there already' "$id" "$(cat "$T/out")"
  cas 0 snapshot "$S::w@t"
  cas 1 pull "$S::w@t" v@s -- "$NBDSERVE" -s "$T/store::"
  says 'pull w@t v@s: that name is taken'
}
# Another store, $P, which has v and v@s with so many bytes, those of $T/in, and
# ID, that of v@s; and an empty one, $S
peers() { # bytes
  unless NO_CAS && unless NO_CLIENT || return 1
  S=$T/store P=$T/peer SIZE=$1
  noise "$1" >"$T/in"
  cas 0 init "$S"
  cas 0 init "$P"
  cas 0 import "$P::v" "$T/in"
  sealed v@s
}
sealed() { # VOL@SNAP of $P, which is made: ID
  cas 0 snapshot "$P::$1"
  cas 0 seal "$P::$1"
  ID=$(cat "$T/out")
}
# A pull from $P: MOVED, the bytes that came, as its server tells
fetch() { # STATUS VOL@SNAP NAME
  cas "$1" pull "$S::$2" "$3" -- "$NBDSERVE" -s --stats "$P::"
  MOVED=$(sed -n 's/^{.*"bytes_read":\([0-9]*\).*/\1/p' "$T/err")
  grep -v '^{"clients"' "$T/err" >"$T/others"
  mv "$T/others" "$T/err"
}
moved() { # at most so many bytes
  assertTrue "$MOVED bytes came, and $1 may" "[ $MOVED -le $1 ]"
}
# $S has what was pulled as that volume, and nothing else
whole() { # VOL
  assertEquals 'its id' "$ID" "$(tail -n 1 "$T/out")"
  names
  assertEquals 'all that is there' "$1 $1@s " "$GOT"
  same "$1@s" "$T/in"
  cas 0 verify "$S"
}
again() { # the same, after what was pulled as that volume was removed
  cas 0 rm "$S::$1@s" "$1"
}

testPullTakesAUriOrACommand() {
  peers 300000 || return 0
  fetch 0 w@s "$ID"
  whole w
  again w
  serve "$P::"
  for name in v@s "$ID"; do
    cas 0 pull "$S::w@s" "$(uri "$name")"
    whole w
    again w
  done
  unless NO_THREADS || return 0
  cas 0 pull "$P::v@t" "$(uri v@s)" # from itself
  assertEquals "$ID" "$(cat "$T/out")"
  peer=$(uri v@s)
  serve "$S::"
  cas 0 pull "$S::a@s" "$peer"
  whole a
  again a
  cas 0 pull "$S::b@s" v@s -- "$NBDSERVE" -s "$P::"
  whole b
}
testPullTakesAUriOfTcp() {
  peers 300000 && tcp || return 0
  start -p 0 "$P::"
  port=${URI##*:}
  for uri in "${URI%/*}/v@s" "nbd://localhost:${port%/*}/v%40s"; do
    cas 0 pull "$S::w@s" "$uri"
    whole w
    again w
  done
  stop TERM
  cas 1 pull "$S::w@t" "$uri"
  says "$uri: Connection refused"
}
testNamesInUrisAreDecoded() {
  peers 5000 || return 0
  cas 0 rename "$P::v" 'ü %b?#&'
  cas 0 rename "$P::ü %b?#&@s" 'ü %b?#&@s t'
  serve "$P::"
  for name in '%C3%BC%20%25b%3F%23%26@s%20t' 'ü %25b%3f#&%40s t'; do
    cas 0 pull "$S::w@s" "nbd+unix:///$name?socket=${SOCK%/*}%2f${SOCK##*/}"
    whole w
    again w
  done
  stop TERM
  fetch 0 'ä b@s' 'ü %b?#&@s t'
  whole 'ä b'
}
testUrisThatNameNoServerAreRefused() {
  peers 5000 || return 0
  SOCK=$T/s
  for uri in nbds://localhost/v@s "nbds+unix:///v@s?socket=$SOCK" \
    "nbd+unix:///v@s?socket=$SOCK&tls-certificates=x" nbd+unix:///v@s \
    'nbd+unix:///v@s?socket=' "nbd+unix:///v%ZZ?socket=$SOCK" \
    "nbd+unix:///v%0?socket=$SOCK" "nbd+unix:///v%00?socket=$SOCK" \
    "nbd+unix:///v@s?sock=$SOCK" "nbd+unix:///v@s?socket=$SOCK%" \
    "nbd+unix:///v@s?socket=$SOCK#x" "nbd+unix://x/v@s?socket=$SOCK" \
    "nbd://localhost/v@s?socket=$SOCK" 'nbd://[::1]x/v@s' "$SOCK" v@s '' \
    nbd://localhost:0/v@s nbd://localhost:1K/v@s nbd://localhost:65536/v@s \
    nbd://localhost:%31/v@s nbd://localhost:+1/v@s 'nbd://[::1]:1K/v@s'; do
    cas 2 pull "$S::w@s" "$uri"
    says ': not as nbd://HOST'
  done
  cas 2 repair "$S" "nbd+unix:///v%ZZ?socket=$SOCK"
  says ': not as nbd://HOST'
  cas 1 pull "$S::w@s" "$(uri v@s)"
  says "$T/s: No such file"
}
testPullTakesItsOperandsAndOptionsOnly() {
  peers 5000 || return 0
  for words in '' "$S" "$S::w@s" "$S::w@s nbd://x/y z" "$S::w@s -- false" \
    "$S::w@s a b -- false"; do
    # shellcheck disable=SC2086
    cas 2 pull $words
    says 'usage: nbdserve pull STORE::VOLUME@SNAP FROM'
  done
  for option in -r -n -s -1 --accept-loss --run=false; do
    cas 2 pull $option "$S::w@s" nbd://x/y
    says 'not for the command pull'
  done
  cas 2 pull --run=false "$S::w@s" v@s -- false # neither is ignored
  says '--run: not for the command pull'
  cas 0 --json pull "$S::w@s" v@s -- "$NBDSERVE" -s "$P::"
  assertEquals "{\"id\":\"$ID\"}" "$(cat "$T/out")"
}
testPullOfNothingAndOfHoles() {
  peers 5000 || return 0
  cas 0 create "$P::none" 0
  cas 0 create "$P::holes" 1T
  cas 0 create "$P::far" 1T
  DISK=$P::far
  talk "$(ask GO)" WRITE,1,0,3 616263 WRITE,2,500000000000,3 646566 \
    WRITE,3,1099511627773,3 676869 DISC,0,0,0
  for name in none holes far; do
    sealed "$name@s"
    fetch 0 "$name@s" "$name@s"
    moved 300000
  done
  DISK=$S::far
  talk "$(ask GO)" READ,1,0,4 READ,2,500000000000,3 READ,3,1099511627773,3 \
    DISC,0,0,0
  assertContains "$GOT" 'OK.1=61626300 OK.2=646566 OK.3=676869'
  cas 0 verify "$S"
}
testPullOfWhatBecameZeroes() {
  peers 5000 || return 0
  DISK=$P::v
  talk "$(ask GO)" ZEROES,1,0,5000 DISC,0,0,0
  sealed v@zero
  fetch 0 w@s v@zero
  truncate -s 0 "$T/in"
  truncate -s 5000 "$T/in"
  whole w
}
testPullLeavesTheVolumeAloneAndFetchesNothingTwice() {
  peers 3000000 || return 0
  noise 5000 >"$T/own"
  cas 0 import "$S::w" "$T/own"
  fetch 0 w@s v@s
  moved $((SIZE * 1012 / 1000 + SIZE * 8 / 1000 + 100000))
  whole w
  same w "$T/own"
  stored
  was=$GOT
  for new in w@t x@t; do
    fetch 0 "$new" v@s
    moved 4096 # the head
    same "$new" "$T/in"
  done
  stored
  assertTrue "$was and then $GOT" "[ $GOT -lt $((was + 100000)) ]"
}
testPullOfAnIncrementMovesWhatDiffers() {
  peers 12000000 || return 0
  fetch 0 w@s v@s
  DISK=$P::v
  for n in 1 10; do # blocks, in one leaf
    talk "$(ask GO)" WRITE,1,6144000,$((n * 4096)) \
      "$(noise $((n * 4096)) | hex)" DISC,0,0,0
    sealed "v@$n"
    fetch 0 "w@$n" "v@$n"
    assertEquals "$ID" "$(cat "$T/out")"
    moved $((n * 4096 * 1012 / 1000 + 33000 + 100000))
    cas 0 export "$P::v@$n" "$T/in"
    same "w@$n" "$T/in"
  done
  cas 0 verify "$S"
}
testPullTakesBlocksThatAreElsewhere() {
  peers 3000000 || return 0
  { noise 4096; cat "$T/in"; } >"$T/moved"
  cas 0 import "$S::x" "$T/moved"
  stored
  was=$GOT
  fetch 0 w@s v@s
  moved 100000 # the tree
  stored
  assertTrue "$was and then $GOT" "[ $GOT -lt $((was + 200000)) ]"
  same w@s "$T/in"
  cas 0 verify "$S"
}
testWhatCannotBePulledIsTold() {
  peers 5000 || return 0
  cas 0 snapshot "$P::v@unsealed"
  for name in v v@unsealed v@nix /blocks "sha256-$(zeroes 32)"; do
    fetch 1 w@s "$name"
    says "pull w@s $name: the peer refuses .*only what is sealed"
  done
  for name in w w@ @s w@s@t w@s/pull ''; do
    fetch 2 "$name" v@s
    says ': (not a name|a snapshot is called VOLUME@NAME|a name with @)'
  done
  fetch 0 w@s v@s
  fetch 0 w@s v@s
  cas 0 snapshot "$S::w@t"
  fetch 1 w@t v@s
  says 'pull w@t v@s: that name is taken'
  S=$T/8k
  cas 0 init "$S" 8K
  fetch 2 w@s v@s
  says 'pull w@s v@s: the peer.s blocks have 4096 bytes, not 8192'
  for peer in "$NBDSERVE -s mem:1M" "$NBDSERVE -s mem:1000" /bin/false \
    'cat /dev/null' "$T/nix" 'echo there is no server here' 'sleep 1.5'; do
    # shellcheck disable=SC2086
    cas 1 --stall 1 pull "$S::w@s" v@s -- $peer
    says 'pull w@s v@s: (that is no NBD|the peer)'
  done
  names
  assertEquals 'nothing came' '' "$GOT"
}
testPullsCommandIsToldToEndAfterFiveSeconds() {
  peers 5000 || return 0
  begun=$(clock)
  cas 0 pull "$S::w@s" v@s -- sh -c '"$0" -s "$1"; exec sleep 60' \
    "$NBDSERVE" "$P::"
  says 'sh: has ended with status 143'
  assertTrue 'after five' "[ $(($(clock) - begun)) -ge 5000 ]"
  whole w
}

# ---- Pulls that are interrupted ---------------------------------------------

# 20 MB come in two parts: 16 MiB, which are kept, and the rest, within which
# the connection is after so many bytes
SOME=17500000
# A pull of v@s as w@s in the background, which stands still after so many bytes
# until $T/stall is removed: JOB, PID
begin() { # bytes
  OUT=$T/pulled
  rm -f "$T/stalls"
  : >"$T/stall"
  : >"$OUT"
  spawn pull "$S::w@s" v@s -- sh -c '"$0" -s "$1" | {
      dd bs=4k iflag=count_bytes count="$2" 2>/dev/null
      : >"$3/stalls"
      while [ -e "$3/stall" ]; do sleep 0.05; done
      exec cat
    }' "$NBDSERVE" "$P::" "$1" "$T"
  await "[ -e '$T/stalls' ]"
  spawned
}
ended() { # status of JOB, which ends by itself
  wait "$JOB"
  assertEquals 'status' "$1" $?
  JOBS=$(echo " $JOBS " | sed "s/ $JOB:$PID / /")
}
# A pull whose connection is cut off after so many bytes
cut_off() { # bytes
  cas 1 pull "$S::w@s" v@s -- sh -c '"$0" -s "$1" |
    dd bs=4k iflag=count_bytes count="$2" 2>/dev/null' "$NBDSERVE" "$P::" "$1"
  says 'pull w@s v@s: the peer (has hung up|is gone)'
}
# What is left then: a partial, and nothing else
partial() {
  rm -f "$T/stall"
  listed
  assertEquals 'a partial' "$ID/partial	$SIZE" "$(echo "$GOT" | cut -f1,2)"
  cas 1 export "$S::$ID/partial" "$T/x"
  says 'no such volume'
  cas 0 verify "$S"
}
goes_on() { # and ends, and the partial is gone
  await "! '$NBDSERVE' uri '$P' >/dev/null 2>&1"
  fetch 0 w@s v@s
  moved $((SIZE - 16000000))
  whole w
}

testPullThatIsEndedIsGoneOnWith() {
  peers 20000000 || return 0
  begin $SOME
  kill -TERM "$PID"
  await "grep -q . '$T/err'"
  says 'pull w@s v@s: Operation canceled'
  rm "$T/stall" # it waits for its command
  ended 1
  partial
  begin 1000000 # of those that are left
  stop KILL
  partial
  goes_on
}
testPullThatIsCutOffAnywhereIsGoneOnWith() {
  peers 20000000 || return 0
  for bytes in 10 100 300 5000 10000 16000 20000 100000 $SOME; do
    cut_off "$bytes"
    cas 0 list "$S"
    [ ! -s "$T/out" ] || partial
  done
  goes_on
}
testPullByAServerEndsWithItsCommandOrTheServer() {
  peers 20000000 && unless NO_THREADS || return 0
  bytes=$SOME
  for signal in TERM KILL; do
    serve "$S::"
    server=$JOB:$PID
    begin "$bytes"
    bytes=1000000 # of those that are left
    puller=$JOB:$PID JOB=${server%:*} PID=${server#*:}
    stop $signal
    JOB=${puller%:*} PID=${puller#*:}
    rm "$T/stall"
    ended 1
    says 'pull.*cancel'
    partial
  done
  serve "$S::"
  begin "$bytes"
  cas 1 rm "$S::$ID/partial"
  says 'in use by a client'
  stop KILL
  await "[ \"\$('$NBDSERVE' list '$S' | cut -f5)\" = 0 ]"
  partial
  goes_on
}
testPullKilledAgainAndAgainEndsWithTheId() {
  peers 20000000 || return 0
  OUT=$T/pulled LOG='the peer (has hung up|is gone)|ended with status 137'
  for i in 1 2 3 4 5 6 7 8 9 10; do
    rm -f "$T/peer.pid"
    spawn pull "$S::w@s" v@s -- sh -c 'echo $$ >"$0"; exec "$@"' \
      "$T/peer.pid" "$NBDSERVE" -s --delay read:20 "$P::"
    await "[ -s '$T/peer.pid' ] && [ -s '$T/pid$NSERVE' ]"
    spawned
    sleep "0.$(printf %03d $(($(noise 2 | od -An -tu2) % 300)))"
    if [ $((i % 2)) = 0 ]; then
      stop KILL
    else
      kill -9 "$(cat "$T/peer.pid")" 2>/dev/null
      wait "$JOB"
      JOBS=''
    fi
    names
    [ "${GOT#w}" = "$GOT" ] || again w # it was faster
    cas 0 verify "$S"
  done
  await "! '$NBDSERVE' uri '$P' >/dev/null 2>&1"
  fetch 0 w@s v@s
  whole w
}
testPartialIsOfNoUseAndRemovedByItsId() {
  peers 20000000 || return 0
  cut_off $SOME
  id=$ID/partial
  for words in "clone $S::$id x" "rename $S::$id x" "resize $S::$id 5" \
    "diff $S::$id $id" "seal $S::$id" "-s $S::$id" "snapshot $S::$id@x" \
    "clone $S::$ID x" "-s $S::$ID" "rm $S::$ID" \
    "pull $P::x@y $ID -- $NBDSERVE -s $S::"; do
    # shellcheck disable=SC2086
    cas 1 $words
  done
  : >"$T/err"
  [ "$SWITCH" = POSIX_ONLY ] || cas 0 gc "$S" # it is not a week old
  partial
  stored
  assertTrue "it takes $GOT" "[ $GOT -gt 16000000 ]"
  cas 0 rm "$S::$ID/partial"
  stored
  assertTrue "it took $GOT" "[ $GOT -lt 200000 ]"
  names
  assertEquals '' "$GOT"
}
testPartialIsNoExport() {
  peers 20000000 || return 0
  cut_off $SOME
  cas 0 create "$S::x" 64K
  DISK=$S::
  talk "$(ask GO "$(of "$ID")")" "$(ask GO "$(of "$ID/pull")")" "$(opt LIST)" \
    "$(opt ABORT)"
  expect go=unknown go=unknown list=server:x list=ack abort=ack
  : >"$T/err"
  serve "$S::"
  assertEquals 'the first export' "$(uri x)" "$URI"
}
testGcRemovesAPartialThatIsAWeekOld() {
  unless POSIX_ONLY || return 0
  if [ -n "$EMULATOR${SANITIZER-}" ]; then
    skip 'its clock cannot be put forward'
    return 0
  fi
  peers 20000000 || return 0
  cat >"$T/later.c" <<'END'
#define _GNU_SOURCE
#include <time.h>
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec + DAYS * 86400;
  return now.tv_sec + DAYS * 86400;
}
END
  cut_off $SOME
  for days in 6 8; do
    partial
    # shellcheck disable=SC2086
    does $CC $CFLAGS -shared -fPIC -DDAYS=$days -o "$T/$days.so" "$T/later.c"
    within "env LD_PRELOAD='$T/$days.so' '$BARE'"
    cas 0 gc "$S"
    NBDSERVE=$BARE
  done
  names
  assertEquals '' "$GOT"
}
testAnIdIsPulledByOneAtATime() {
  peers 20000000 && unless NO_THREADS || return 0
  serve "$S::"
  begin $SOME
  cas 1 pull "$S::x@y" v@s -- "$NBDSERVE" -s "$P::"
  says 'pull x@y v@s: another pull'
  rm "$T/stall"
  ended 0
  cp "$OUT" "$T/out"
  whole w
}
testPullOnAFullDiskLeavesRoomForOthers() {
  unless POSIX_ONLY && unless NO_CLIENT || return 0
  ! is_variant || { skip 'no other than in the plain build'; return 0; }
  disk tmpfs 110 || return 0
  P=$T/store SIZE=50000000
  noise $SIZE >"$T/in"
  cas 0 import "$P::v" "$T/in"
  sealed v@s
  cas 0 init "$S"
  cas 0 create "$S::x" 64M
  serve "$S::"
  cas 1 pull "$S::w@s" v@s -- "$NBDSERVE" -s "$P::"
  says 'pull w@s v@s: [Nn]o space left.*list, rm'
  names
  assertEquals "$ID/partial x " "$GOT"
  brim x add:20 over:50 flush check
  mount -o remount,size=200M "$T/m"
  fetch 0 w@s v@s
  moved $((SIZE - 16000000))
  same w@s "$T/in"
  stop TERM
  cas 0 verify "$S"
  no_disk
}

# ---- Repair from a peer -----------------------------------------------------

# A bit of every 50th block of $S, whatever is in it
flip_every_50th() {
  at=$((19 * 1048576 + 100))
  while [ $at -lt "$(wc -c <"$S")" ]; do
    flip $at
    at=$((at + 50 * 4096))
  done
}
# $S is a copy of $P, but in every 50th block a bit is wrong
damaged_copy() {
  peers 3000000 || return 1
  cp "$P" "$S"
  flip_every_50th
  cas 3 verify "$S"
  assertTrue 'some are damaged' "[ $(wc -l <"$T/out") -ge 10 ]"
}
testRepairGetsWhatAPeerHas() {
  damaged_copy || return 0
  cp "$S" "$T/again"
  serve "$P::"
  cas 0 repair "$S" "nbd+unix:///?socket=$SOCK"
  whole_again='cas 0 verify "$S"; same v "$T/in"; same v@s "$T/in"'
  eval "$whole_again"
  stop TERM
  S=$T/again
  cas 0 repair "$S" -- "$NBDSERVE" -s "$P::"
  eval "$whole_again"
}
testRepairGetsItFromAPeerThatIsOnlyRead() {
  damaged_copy || return 0
  cas 0 repair "$S" -- "$NBDSERVE" -s -r "$P::"
  cas 0 verify "$S"
}
testRepairFromAPeerBesideClients() {
  damaged_copy && unless NO_THREADS && build client || return 0
  cas 0 create "$S::w" 64M
  serve "$P::"
  peer="nbd+unix:///?socket=$SOCK"
  serve "$S::"
  "$W/client" brim "$SOCK" w "$T/shadow.w" add:100 over:200 flush check \
    over:200 flush check >"$T/brim" 2>&1 &
  clients=$!
  cas 0 repair "$S" "$peer"
  wait $clients
  assertEquals "clients: $(tail -n 3 "$T/brim")" 0 $?
  same v "$T/in"
  stop TERM
  cas 0 verify "$S"
}
# $P and $S, which are the same: v, and v@s sealed, of 110 leaves with 16 blocks
# in each.  LEAVES: their pages.
leafy() {
  unless NO_CAS && unless NO_CLIENT || return 1
  S=$T/store P=$T/peer
  noise $((110 * 65536)) >"$T/blocks"
  truncate -s $((110 * 1016 * 4096)) "$T/in"
  for i in $(seq 0 109); do
    dd if="$T/blocks" of="$T/in" bs=4096 skip=$((i * 16)) \
      seek=$((i * 1016 + i)) count=16 conv=notrunc 2>/dev/null
  done
  cas 0 init "$P"
  cas 0 import "$P::v" "$T/in"
  sealed v@s
  cp "$P" "$S"
  pages_of_first
  LEAVES=''
  for i in $(seq 0 109); do LEAVES="$LEAVES $(entry "${MAP##* }" "$i")"; done
}
# A bit of one copy of a page: of that which has one wrong already, if it is one
# of every 50th block
flip_one() { # page
  page=$1 second=$(twin "$1")
  case $((page % 50)),$((second % 50)) in
    0,*) ;;
    *,0 | *[13579],*) page=$second ;;
  esac
  flip $(($(slot "$page") + 300))
}
# Pages of a map are mended from their twins, some before the server has read
# them, and some behind its back; blocks by the peer.
testRepairMendsPagesAndBlocksBesideClients() {
  unless NO_THREADS && leafy && build client || return 0
  flip_every_50th
  cas 3 verify "$S"
  assertTrue 'some are damaged' "[ $(wc -l <"$T/out") -ge 30 ]"
  checks && checked=1 || checked=0
  LOG='client .: NBD_CMD_READ .*Input/output error'
  i=0
  for page in $MAP $LEAVES; do
    [ $((i += 1)) -gt 50 ] || flip_one "$page"
  done
  cp "$T/in" "$T/v"
  serve "$P::"
  peer="nbd+unix:///?socket=$SOCK"
  serve "$S::"
  for page in $MAP $LEAVES; do
    [ $((i -= 1)) -ge 50 ] || flip_one "$page"
  done
  "$W/client" mended "$SOCK" v v@s "$T/in" "$T/v" "$checked" >"$T/mended" 2>&1 &
  clients=$!
  await "grep -q damaged '$T/mended'"
  cas 0 repair "$S" "$peer"
  wait $clients
  assertEquals "clients: $(tail -n 3 "$T/mended")" 0 $?
  for page in $MAP $LEAVES; do
    for copy in "$page" "$(twin "$page")"; do
      cmp -s -n 4096 -i "$(slot "$copy")" "$S" "$P" ||
        fail "a copy of page $page is not mended"
    done
  done
  stop TERM
  cas 0 verify "$S"
  same v@s "$T/in"
  same v "$T/v"
}
# No peer is asked for pages of a map: repair mends all else, and says what is
# below those that are lost with their twins.  A pull of the id gets that, once
# the snapshot that is damaged is gone; the volume is rolled back to it.
testWhatIsBelowLostPagesIsPulledByItsId() {
  unless NO_THREADS && leafy || return 0
  flip_every_50th
  cp "$S" "$T/damaged"
  leaves=$(echo "$LEAVES" | cut -d' ' -f5,52,111) # the first field is empty
  for lost in "$leaves" "${MAP##* }" "${MAP%% *}"; do
    cp "$T/damaged" "$S"
    told='v@s	0	457768960	the map cannot be read'
    [ "$lost" != "$leaves" ] ||
      told='v@s	12484608	4161536	the map cannot be read
v@s	208076800	4161536	the map cannot be read
v@s	453607424	4161536	the map cannot be read'
    for page in $lost; do flip_both "$page" 300; done
    serve "$S::"
    cas 3 repair "$S" -- "$NBDSERVE" -s "$P::"
    assertEquals 'of v' "$told" "$(sed -n 's/^v	/v@s	/p' "$T/out")"
    assertEquals 'of v@s' "$told" "$(grep @ "$T/out")"
    cas 1 export "$S::v@s" "$T/x"
    says 'export v@s.*: Input/output error'
    cas 0 rm "$S::v@s"
    fetch 0 v@s "$ID"
    assertEquals "$ID" "$(cat "$T/out")"
    [ "$lost" != "$leaves" ] || moved $((3 * 65536 + 110 * 37000 + 100000))
    cas 0 rollback "$S::v@s"
    stop TERM
    cas 0 verify "$S"
    same v "$T/in"
    same v@s "$T/in"
  done
}
# The same id, or the next one, under another name: what is lost here is not
# shared, but pulled.
testPullSharesNothingOfWhatIsLost() {
  leafy || return 0
  leaves=$(echo "$LEAVES" | cut -d' ' -f5,111)
  sound=$ID
  cp "$T/in" "$T/new"
  noise 4096 | dd of="$T/new" bs=4096 seek=5000 conv=notrunc 2>/dev/null
  cas 0 import "$P::new" "$T/new"
  sealed new@s
  cp "$S" "$T/sound"
  for lost in "$leaves" "${MAP##* }" "${MAP%% *}"; do
    cp "$T/sound" "$S"
    for page in $lost; do flip_both "$page" 300; done
    cas 3 verify "$S"
    told=$(cat "$T/out")
    fetch 3 v@s v@s
    says 'pull v@s v@s: the store is damaged'
    fetch 0 w@s "$sound"
    same w@s "$T/in"
    fetch 0 v@new new@s
    same v@new "$T/new"
    fetch 0 v@t "$sound"
    same v@t "$T/in"
    cas 3 verify "$S"
    assertEquals 'what was lost' "$told" "$(cat "$T/out")"
    cas 0 rollback "$S::v@t"
    cas 0 rm "$S::v@s"
    cas 0 verify "$S"
    same v "$T/in"
  done
}
# The tree of an id is checked and mended as all else is.  While it is damaged
# the snapshot can be read, but not be pulled.
testTheTreeOfAnIdIsCheckedAndMended() {
  peers 300000 || return 0
  LOG='client 1: NBD_CMD_READ .*Input/output error'
  cas 0 init "$T/third"
  cp "$P" "$S"
  pages_of_first
  tree=$(word $(($(slot "$CATALOG") + 32 + 288 + 36))) # of the second record
  for _ in 3 2 1; do tree="$tree $(entry "${tree##* }" 0)"; done
  flip $(($(slot "$(entry "${tree##* }" 0)") + 5))
  for page in $tree; do flip $(($(slot "$(twin "$page")") + 300)); done
  reports 'v@s 0 0 the tree of its id is damaged'
  cas 3 repair "$S"
  cas 1 pull "$T/third::w@s" v@s -- "$NBDSERVE" -s "$S::"
  says 'pull w@s v@s: the peer' # cannot read, or what it read does not fit
  same v@s "$T/in"
  cas 0 repair "$S" -- "$NBDSERVE" -s "$P::"
  cas 0 verify "$S"
  for page in $tree; do
    assertEquals "page $page" "$(block "$page")" "$(block "$(twin "$page")")"
  done
  cas 0 pull "$T/third::w@s" v@s -- "$NBDSERVE" -s "$S::"
  assertEquals "$ID" "$(cat "$T/out")"
  flip_both "${tree##* }" 300
  loses 'v@s 0 0 the tree of its id is damaged'
  cas 3 repair "$S" -- "$NBDSERVE" -s "$P::"
  fetch 0 v@t "$ID"
  cas 0 rm "$S::v@s"
  cas 0 verify "$S"
  same v@t "$T/in"
}
# Nothing waits for a peer that says nothing, not even what is being mended.
testRepairFromASilentPeerHoldsNobodyUp() {
  damaged_copy && unless NO_THREADS || return 0
  cas 0 snapshot "$S::v@x"
  serve "$S::"
  timeout 20 "$NBDSERVE" repair "$S" -- \
    "$NBDSERVE" -s --delay read:3000 "$P::" >"$T/rows" 2>&1 &
  mends=$!
  sleep 4 # the head is read; the first block is waited for
  from=$(date +%s)
  cas 0 rm "$S::v@x" v@s v
  cas 0 create "$S::y" 1M
  assertTrue 'at once' "[ $(($(date +%s) - from)) -le 2 ]"
  kill $mends
  wait $mends
  stop TERM
}
testRepairTellsWhatThePeerLacks() {
  needs python3 && damaged_copy || return 0
  noise 409600 >"$T/own"
  cas 0 import "$S::own" "$T/own"
  LOG='client 1: NBD_CMD_READ .*Input/output error'
  python3 - "$S" "$T/own" <<'END'
import sys
with open(sys.argv[1], "r+b") as f, open(sys.argv[2], "rb") as own:
    data, block = f.read(), own.read()[40960:45056]
    f.seek(data.index(block) + 5)
    f.write(bytes([block[5] ^ 1]))
END
  cas 3 repair "$S" -- "$NBDSERVE" -s "$P::"
  assertEquals 'own	40960	4096' "$(cut -f1-3 "$T/out")"
  cas 3 verify "$S"
  assertEquals 'own	40960	4096' "$(cut -f1-3 "$T/out")"
}
testRepairFromWhatIsNoSuchStoreFails() {
  damaged_copy || return 0
  LOG='client 1: NBD_CMD_READ .*'
  cas 0 init "$T/8k" 8K
  cas 2 repair "$S" -- "$NBDSERVE" -s "$T/8k::"
  says "repair $S: the peer.s blocks have 8192 bytes, not 4096"
  cas 1 repair "$S" -- false
  says "repair $S: the peer has hung up"
}
testRepairWritesToNoPeerThatIsNoStore() {
  unless NO_FLAT && damaged_copy || return 0
  noise 4194304 >"$T/was"
  for size in 4M 1M 1060864; do # the last one is that of /blocks
    truncate -s $size "$T/was"
    cp "$T/was" "$DISK"
    run repair "$S" -- "$NBDSERVE" -s "$DISK"
    assertNotEquals "status with $size" 0 "$STATUS"
    says "repair $S: "
    assertTrue "$size are as they were" "cmp '$DISK' '$T/was'"
  done
  run repair "$S" -- "$NBDSERVE" -s "$P::v"
  says "repair $S: "
  S=$P
  same v "$T/in"
}

# ---- What a peer is served --------------------------------------------------

testStandardStreamsOfAStoreThatAnotherServes() {
  peers 300000 && unless NO_THREADS || return 0
  serve "$P::"
  DISK=$P::
  talk "$(ask GO "$(of v)")" READ,1,0,2 WRITE,2,0,2 6162 READ,3,0,2 DISC,0,0,0
  assertContains "$GOT" "OK.1=$(head -c 2 "$T/in" | hex) OK.2 OK.3=6162"
  assertNotContains "$GOT" exit=
  for option in --read-only --stats --no-verify '--delay read:1'; do
    # shellcheck disable=SC2086
    cas 2 -s $option "$P::"
    says "^nbdserve: ${option% *}: not for a store that another process serves"
  done
  cas 4 -s "$P::v"
  assertContains "$(cat "$T/err")" "$P: in use by a server"
  : >"$T/err"
  talk "$(ask GO "$(of v)")" READ,1,0,2 DISC,0,0,0
  assertContains "$GOT" OK.1=6162
}
# The server is told when the process that has passed a client on is gone.
testStandardStreamsEndWithTheProcessThatHadThem() {
  peers 5000 && unless NO_THREADS || return 0
  LOG='client .: (gone|connected).*'
  serve -v "$P::"
  mkfifo "$T/hold"
  sleep 20 >"$T/hold" & # what the client sends does not end
  holds=$!
  IN=$T/hold OUT=$T/held
  : >"$OUT"
  spawn -s "$P::"
  await "[ \$(wc -c <'$OUT') -ge 18 ]"
  spawned
  stop KILL
  await "grep -q 'client 1: gone' '$T/err'"
  kill $holds
  wait $holds 2>/dev/null || :
}
testStandardStreamsGetAllOfTheStore() {
  peers 300000 && unless NO_THREADS || return 0
  cas 0 create "$P::other" 1M
  serve "$P::other"
  cas 0 pull "$S::w@s" v@s -- "$NBDSERVE" -s "$P::"
  same w@s "$T/in"
  stop TERM
}
testStandardStreamsEndWithTheServer() {
  peers 5000 && unless NO_THREADS || return 0
  serve "$P::"
  server=$JOB
  mkfifo "$T/hold"
  sleep 20 >"$T/hold" &
  holds=$!
  IN=$T/hold OUT=$T/held
  : >"$OUT"
  spawn -s "$P::"
  front=$JOB JOB=$server
  await "[ \$(wc -c <'$OUT') -ge 18 ]"
  stop KILL
  wait "$front"
  assertEquals 'status' 1 $?
  says 'serve: canceled, or no answer from the server'
  kill $holds
  wait $holds 2>/dev/null || :
}
testPullExportIsNotListedAndOnlyRead() {
  peers 300000 || return 0
  DISK=$P::
  talk "$(opt LIST)" "$(opt ABORT)"
  expect list=server:v list=server:v@s:snapshot list=ack abort=ack
  for name in v/pull v@/pull /pull v@s/pull/pull v@s/blocks blocks; do
    talk "$(ask GO "$(of $name)")" "$(opt ABORT)"
    expect go=unknown abort=ack
  done
  : >"$T/err"
  talk "$(ask GO "$(of "$ID/pull")")" READ,1,0,16 READ,2,16,8 READ,3,24,32 \
    WRITE,4,0,1 61 TRIM,5,0,4096 ZEROES,6,0,4096 READ,7,1351679,1 \
    READ,8,1351680,1 READ,9,1351679,2 DISC,0,0,0
  assertEquals "OK.1=4e424453$(of PULL)0000000100001000 OK.2=00000000000493e0 \
OK.3=${ID#*-} EPERM.4 EPERM.5 EPERM.6 OK.7=00 EINVAL.8 EINVAL.9" \
    "$(echo "$GOT" | cut -d' ' -f3-)"
}
testPullExportReadsTheSameInPieces() {
  peers 1234567 && unless NO_THREADS && has_nbdsh || return 0
  serve "$P::"
  URI=$(uri v@s/pull)
  nbd_python <<END
import hashlib, random, subprocess
random.seed($SEED)
h.connect_uri(uri)
size = h.get_size()
assert h.is_read_only() and h.can_multi_conn()
whole = b"".join(h.pread(4096, at) for at in range(0, size, 4096))
for i in range(300):
    at = random.randrange(random.choice([size, 60000]))
    n = min(random.choice([1, 13, 5000, 100000]), size - at)
    assert h.pread(n, at) == whole[at:at+n], (at, n)
assert h.pread(size, 0) == whole
data = whole[1 << 20:]
with open("$T/in", "rb") as f: assert f.read() == data[:1234567]
assert not any(data[1234567:])
d0 = b"".join(hashlib.sha256(data[at:at+4096]).digest()
              for at in range(0, len(data), 4096))
assert whole[16384:16384+len(d0)] == d0
d1 = hashlib.sha256(d0 + bytes(1016 * 32 - len(d0))).digest()
assert whole[12288:12320] == d1
r = subprocess.run(["$NBDSERVE", "rm", "$P::v@s"], capture_output=True)
assert r.returncode == 1 and b"in use by a client" in r.stderr, r
END
}
testBlocksAreReadByTheirSha256() {
  peers 1000000 && unless NO_THREADS && has_nbdsh || return 0
  LOG='client .: NBD_CMD_(READ|WRITE) .*(Input/output error|Invalid argument)'
  serve "$P::"
  URI="nbd+unix:////blocks?socket=$SOCK"
  nbd_python <<END
import hashlib
h.connect_uri(uri)
assert h.get_size() == 12288 + 256 * 4096, h.get_size()
assert h.pread(16, 0) == b"NBDSBLKS" + bytes([0, 0, 0, 1, 0, 0, 16, 0])
with open("$T/in", "rb") as f: data = f.read()
blocks = [data[at:at+4096] for at in range(0, 200 * 4096, 4096)]
digests = [hashlib.sha256(b).digest() for b in blocks]
h.pwrite(digests[7] + bytes(32) + digests[3] + b"x" * 32, 4160)
assert h.pread(4096, 12288 + 2 * 4096) == blocks[7]
assert h.pread(4096, 12288 + 4 * 4096) == blocks[3]
for i in 0, 3, 5, 6, 255: # nobody has these
    refused(errno.EIO, h.pread, 4096, 12288 + i * 4096)
h.pwrite(b"".join(digests), 4096)
assert h.pread(200 * 4096, 12288) == b"".join(blocks)
for at, n in (12288, 100), (12388, 4096), (12000, 4096):
    refused(errno.EINVAL, h.pread, n, at)
for at in 0, 4095, 12287, 12288:
    refused(errno.EINVAL, h.pwrite, bytes(32), at)
other = nbd.NBD() # has a letter box of its own
other.connect_uri(uri)
refused(errno.EIO, other.pread, 4096, 12288)
other.pwrite(digests[9], 4096)
assert other.pread(4096, 12288) == blocks[9]
assert h.pread(4096, 12288) == blocks[0]
END
}
testPullsPeerMayLieAboutAnything() {
  pulls || return 0
  unit farlies
}
testPullTakesWhatIsOddButTrue() {
  pulls || return 0
  unit farodd
}
testPullOverNarrowPipesWaitsForNobodyWhoWaits() {
  pulls || return 0
  unit farnarrow
}
testPullWaitsForASilentPeerOnlySoLong() {
  pulls || return 0
  unit farstall
}
testPullMayBeCutAfterEveryByte() {
  pulls || return 0
  unit farcut
}
testPullsPeerMayHangUpOrBeGone() {
  pulls || return 0
  unit fargone
}
testPullRefusesATreeThatSealWouldNotMake() {
  pulls || return 0
  unit farforged
}
testPullRefusesWhatIsBehindTheEnd() {
  pulls || return 0
  unit fartail
}
testPullSaysWhyAnExportIsTooSmall() {
  pulls || return 0
  unit farsmall
}
testPullOfSizesAroundBlocksAndLeaves() {
  pulls || return 0
  unit farsizes
}
testPeerThatSaysThereIsNothingIsBelievedOnlyOfNothing() {
  pulls || return 0
  unit farempty
}
testPullRefusesNamesThatCannotBe() {
  pulls || return 0
  unit farnames
}
testRepairWritesNothingThatAPeerMakesUp() {
  pulls || return 0
  unit farrepair
}
testPullExportIsTheSameFromWhereverItIsRead() {
  pulls || return 0
  unit farserved
}
testBlocksExportBearsGarbage() {
  pulls || return 0
  unit farbox
}
testPartOfAPullIsNobodyElsesAndGoesAfterAWeek() {
  pulls || return 0
  unit farbusy
}
testPullBearsThatMemoryLacks() {
  pulls || return 0
  fault farmemory "$T/pool"
}
testPullBearsThatACallFails() {
  pulls || return 0
  fault farcalls "$T/pool"
}
testRepairFromAPeerBearsThatACallFails() {
  pulls || return 0
  fault farmend "$T/pool"
}
testPullOfWhatIsBeingRemovedBeginsAnew() {
  pulls && unless NO_THREADS || return 0
  fault farremoved "$T/pool"
}
testPartOfAPullGoesThoughASnapshotHasItsId() {
  pulls || return 0
  fault farsameid "$T/pool"
}
testPullThatEndsWaitsForWhoVerifiesWhatItHas() {
  pulls && unless NO_THREADS || return 0
  fault farpinned "$T/pool"
}
testPullSealsAMapThatACheckpointThinsOut() {
  pulls || return 0
  fault farthinned "$T/pool"
}
testPullsSealsCheckpointsAndVerifySideBySide() {
  pulls && unless NO_THREADS || return 0
  fault farbeside "$T/pool"
}
testRepairGoesOnWhenWhatItMendsIsRemoved() {
  pulls || return 0
  fault fargoes "$T/pool"
}
testNoPowerCutHarmsWhatIsPulledOrMended() {
  unless NO_CLIENT && simulates && build simulator || return 0
  cuts=$((${POWER_CUTS:-500} * 3))
  ! is_variant || cuts=100
  [ -z "${SANITIZER-}" ] || cuts=40
  does "$W/simulator" peer $cuts 1
}

# ==== [12] CAS (@cas) ========================================================

testWritersReadersAndChangesOfAStoreTogether() { unit together; }
testSlotsThatRunningCountsAreThoseThatOpeningFinds() { unit slots; }
testSixteenLeavesInMemoryAreEnough() { unit cache; }
testLeavesThatAreCopiedStayInMemory() { unit hand; }
testIdsAreOfTheContentAlone() { unit ids; }
testSealedSnapshotsAreFoundByTheirId() { unit seal; }
testDamagedSnapshotsAreNotSealed() { unit rotten; }
testDiffIsWhatComparingFinds() { unit diff; }
testChangedBlocksAreContextsOfTheVolumeThatSetHasFound() {
  unless NO_CAS || return 0
  unit changes
}
testWhatIsLostCountsAsChanged() {
  unless NO_CAS || return 0
  unit lostchanges
}
testSameDataIsStoredOnce() {
  store || return 0
  noise 2097152 >"$T/in"
  cas 0 import "$S::a" "$T/in"
  stored
  before=$GOT
  assertTrue "stored: $GOT" "[ $GOT -gt 2097152 ] && [ $GOT -lt 2200000 ]"
  cas 0 import "$S::b" "$T/in"
  stored
  assertTrue "$before, then $GOT" "[ $GOT -lt $((before + 40000)) ]"
}
testCopiesThatDifferALittleTakeALittle() {
  store || return 0
  noise 2097152 >"$T/in"
  for i in 1 2 3 4 5 6 7 8 9 10; do
    cp "$T/in" "$T/in$i"
    for block in 3 50 401; do
      noise 1000 | dd of="$T/in$i" bs=1 seek=$(((block + i) * 4096 + 17)) \
        conv=notrunc 2>/dev/null
    done
    cas 0 import "$S::v$i" "$T/in$i"
  done
  distinct=$((512 + 3 * 10)) # each copy has three blocks of its own
  pages=$((4 * 10 + 3))      # of maps and the catalog; each lies twice
  stored
  assertTrue "$distinct blocks, $pages pages, $GOT bytes" \
    "[ $GOT -le $(((distinct + 2 * pages) * 4096)) ]"
  for i in 1 5 10; do same v$i "$T/in$i"; done
}
testSnapshotsKeepWhatWasAndRollbackBringsItBack() {
  store || return 0
  noise 1000000 >"$T/one"
  noise 1000000 >"$T/two"
  cas 0 import "$S::v" "$T/one"
  cas 0 snapshot "$S::v@s"
  cas 0 clone "$S::v@s" c d
  DISK=$S::v
  SIZE=1000000
  simple 'OK.1 OK.2' WRITE,1,5000,4 61626364 FLUSH,2,0,0
  cp "$T/one" "$T/new"
  printf abcd | dd of="$T/new" bs=1 seek=5000 conv=notrunc 2>/dev/null
  same v "$T/new"
  for name in v@s c d; do same $name "$T/one"; done
  DISK=$S::c
  simple 'OK.1' WRITE,1,5000,4 61626364
  same c "$T/new"
  same d "$T/one"
  cas 0 rollback "$S::v@s"
  same v "$T/one"
  cas 1 create "$S::v" 5
  says 'create v.*: that name is taken'
  for command in "rollback $S::v@x" "export $S::x $T/x" "snapshot $S::x@s"; do
    # shellcheck disable=SC2086
    cas 1 $command
    says 'no such volume or snapshot'
  done
  cas 0 verify "$S"
}
testSnapshotsAreServedReadOnly() {
  store || return 0
  cas 0 create "$S::v" 64K
  cas 0 snapshot "$S::v@s"
  DISK=$S::v@s
  talk "$(ask GO)" WRITE,1,0,1 61 TRIM,2,0,512 ZEROES,3,0,512 READ,4,0,1 \
    DISC,0,0,0
  expect "go=export:$SIZE:$RO go=ack EPERM.1 EPERM.2 EPERM.3 OK.4=00"
}
testSnapshotOfAServedVolumeAppears() {
  store && unless NO_THREADS && needs nbdinfo || return 0
  cas 0 create "$S::v" 123456
  serve "$S::"
  does nbdinfo --size "$(uri v)"
  assertEquals 123456 "$(cat "$T/log")"
  assertFalse 'no snapshot yet' "nbdinfo --size '$(uri v@s)' 2>'$T/log'"
  cas 0 snapshot "$S::v@s"
  does nbdinfo --size "$(uri v@s)"
  assertEquals 123456 "$(cat "$T/log")"
  does nbdinfo --list "nbd+unix://?socket=$SOCK"
  for name in v v@s; do
    assertContains "$(cat "$T/log")" "export=\"$name\""
  done
}
testRenameTakesTheSnapshotsAlong() {
  store || return 0
  noise 10000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@s"
  cas 0 create "$S::other" 1K
  cas 1 rename "$S::v" other
  says 'rename .*: that name is taken'
  cas 0 rename "$S::v" new
  names
  assertEquals 'new new@s other ' "$GOT"
  same new@s "$T/in"
}
testRmRefusesAVolumeWithSnapshots() {
  store || return 0
  for name in v w x; do cas 0 create "$S::$name" 1M; done
  cas 0 snapshot "$S::v@s"
  cas 1 rm "$S::v"
  says 'rm v.*: .*(snapshots|not empty)'
  names
  assertEquals 'v v@s w x ' "$GOT"
  cas 0 rm "$S::v@s" v w
  names
  assertEquals 'x ' "$GOT"
}
testGcGivesSpaceBack() {
  unless POSIX_ONLY && store || return 0
  noise 20000000 >"$T/much"
  noise 300000 >"$T/in"
  cas 0 import "$S::much" "$T/much"
  cas 0 import "$S::v" "$T/in"
  cas 0 rm "$S::much"
  before=$(du -k "$S" | cut -f1)
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    cas 0 gc "$S"
    assertTrue "$how: $(cat "$T/out")" "grep -q '[0-9]' '$T/out'"
    assertTrue "$before, then $(du -k "$S" | cut -f1)" \
      "[ $(du -k "$S" | cut -f1) -lt $((before - 19000)) ]"
    cas 0 verify "$S"
    same v "$T/in"
  done
  cas 0 import "$S::again" "$T/much"
  same again "$T/much"
}
testResizedVolumesKeepTheirDataAndGrowWithZeroes() {
  store || return 0
  noise 50000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  for size in 99999 20000 7M 1 33333; do
    cas 0 resize "$S::v" $size
    truncate -s $size "$T/in"
    same v "$T/in"
  done
}
# A path so long that STORE.ctl does not fit into an address
testStoreOfALongPathKeepsItsFile() {
  store || return 0
  dir=$T/$(printf %080d 0)
  mkdir "$dir"
  long=$dir/$(printf "%0$((106 - ${#dir}))d" 0)
  mv "$S" "$long"
  cas 0 create "$long::v" 1M
  cas 0 "$long::v" -- true
  [ "$SWITCH" = NO_THREADS ] || says "$long.ctl: .*; no commands are taken"
  cas 0 verify "$long"
}
testWrongNamesAreRefused() {
  store || return 0
  long=$(printf '%0167d' 0)
  for name in a/b "$long" sha256-0 a@ @a "$(printf 'a\tb')" 'a"' "a\\b" \
    "$(printf 'a\233b')" "$(printf 'a\302\233b')" "$(printf 'a\303')" \
    "$(printf '\340\237\277')" "$(printf '\377')"; do
    cas 2 create "$S::$name" 5
    says 'create '
  done
  long=${long#0}
  cas 0 create "$S::$long" 5
  cas 0 snapshot "$S::$long@$long"
  cas 1 snapshot "$S::$long@$long"
  says 'that name is taken'
  cas 0 list "$S"
  assertEquals "$long@$long" "$(cut -f 1 "$T/out" | grep @)"
  cas 0 export "$S::$long@$long" "$T/long"
  cas 0 rm "$S::$long" "$long@$long"
  for name in 'a b' "$(printf '\303\244')" "$(printf '\342\202\254')" \
    "$(printf '\360\237\230\200')"; do
    cas 0 create "$S::$name" 5
  done
  cas 0 create "$S::v" 5
  for name in @s a@b@c v@ v@sha256-0; do
    cas 2 snapshot "$S::v@$name"
    says 'snapshot '
  done
}
testInitAndForeignFiles() {
  store || return 0
  cas 1 init "$S"
  says "$S: exists, "
  for size in 4096 8K 64K; do
    cas 0 init "$T/s$size" $size
    cas 0 stat "$T/s$size"
  done
  assertEquals 'block_size	65536' "$(head -n 1 "$T/out")"
  noise 5000000 >"$T/foreign"
  : >"$T/empty"
  mkdir "$T/dir"
  cp "$S" "$T/older" # whose sums were elsewhere
  for at in 0 1048576; do
    printf '1\0\0\0\1' |
      dd of="$T/older" bs=1 seek=$((at + 7)) conv=notrunc 2>/dev/null
  done
  for file in foreign older empty; do
    cp "$T/$file" "$T/copy"
    for command in list verify stat repair '--accept-loss repair'; do
      # shellcheck disable=SC2086
      cas 1 $command "$T/$file"
      assertNotContains "$file is not damaged" "$(cat "$T/err")" repair
      says "$file: "
    done
    cas 1 create "$T/$file::v" 1M
    says "$file: "
    run "$T/$file::v"
    assertEquals "served: $file" 1 $STATUS
    says "$file"
    assertTrue "$file is untouched" "cmp '$T/$file' '$T/copy'"
  done
  for file in nix dir; do
    cas 1 list "$T/$file"
    says "$file: "
  done
}
# Each bit of SUPER_INCOMPAT keeps it shut, each of SUPER_RO_COMPAT unwritten
testStoresWithUnknownFeaturesAreNotOpenedOrNotWritten() {
  needs python3 && store || return 0
  cas 0 create "$S::v" 5
  cp "$S" "$T/sound"
  for what in '8 00000003' '64 00000001' '64 80000000'; do
    cp "$T/sound" "$S"
    # shellcheck disable=SC2086
    forge 0 $what
    cp "$S" "$T/copy"
    for command in "list $S" "verify $S" "create $S::w 5"; do
      # shellcheck disable=SC2086
      cas 1 $command
      says "$S: "
    done
    assertTrue "$what: untouched" "cmp '$S' '$T/copy'"
  done
  for bits in 00000002 80000001; do
    cp "$T/sound" "$S"
    forge 0 68 $bits
    cp "$S" "$T/copy"
    names
    assertEquals "$bits" 'v ' "$GOT"
    cas 1 create "$S::w" 5
    says "$S: "
    run "$S::v"
    assertEquals "$bits: served for writing" 1 $STATUS
    says "$S"
    assertTrue "$bits: untouched" "cmp '$S' '$T/copy'"
  done
}
testOpenVolumesAreNotRemoved() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1M
  cas 0 create "$S::w" 1M
  serve "$S::v"
  for command in "rm $S::v" "resize $S::v 5"; do
    # shellcheck disable=SC2086
    cas 1 $command
    says ' v.*: .*(busy|in use|is open)'
  done
  cas 0 rm "$S::w"
  names
  assertEquals 'v ' "$GOT"
}
testSecondServerOfAStoreExits4() {
  store || return 0
  cas 0 create "$S::v" 1M
  serve "$S::v"
  run -U "$T/x" "$S::"
  assertEquals 4 $STATUS
  sed -i '/^nbd+unix:/d' "$T/err" # see testASecondServerIsToldWhere...
  says "$S.*in use by a server"
}
testStoreThatIsHeldByAnotherProgramIsInUse() {
  unhurried || return 0
  needs flock && store || return 0
  cas 0 create "$S::v" 1M
  for command in "list $S" "create $S::w 5" "verify $S" "rm $S::v"; do
    # shellcheck disable=SC2086
    flock "$S" "$NBDSERVE" $command >"$T/out" 2>>"$T/err"
    assertEquals "$command" 4 $?
    says "$S: in use"
  done
}
testReadOnlyServerLetsOthersReadAndNobodyWrite() {
  store || return 0
  noise 100000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cp "$S" "$T/copy"
  serve -r "$S::"
  names
  assertEquals 'v ' "$GOT"
  same v "$T/in"
  cas 4 create "$S::w" 5
  says "$S: in use"
  stop TERM
  assertTrue 'unchanged' "cmp '$S' '$T/copy'"
}
testStoreOnAReadOnlyDeviceIsReadAndNotWritten() {
  needs losetup && unless POSIX_ONLY || return 0
  run init "$T/store"
  run create "$T/store::v" 1M
  truncate -s 64M "$T/store"
  device=$(losetup -r -f --show "$T/store" 2>/dev/null)
  if [ -z "$device" ]; then skip 'no loop devices here'; return 0; fi
  run list "$device"
  assertEquals 'list' 0 "$STATUS"
  run create "$device::w" 1M
  assertEquals 'create' 1 "$STATUS"
  says "$device: Read-only file system"
  losetup -d "$device"
}
testTwoHundredClonesAreWrittenThroughOneServer() {
  store && unless NO_THREADS || return 0
  noise 100000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@s"
  stored
  before=$GOT
  n='' rest=''
  for i in $(seq 200); do n="$n c$i"; done
  for i in $(seq 2 200); do rest="$rest c$i"; done
  serve "$S::"
  # shellcheck disable=SC2086
  cas 0 clone "$S::v@s" $n
  client each "$SOCK" c 200
  for i in 1 77 200; do
    cas 0 export "$S::c$i" "$T/out"
    cmp -l "$T/in" "$T/out" >"$T/differ"
    assertEquals "c$i: others" '' \
      "$(awk '$1 <= 8192 || $1 > 12288' "$T/differ" | head -n 3)"
    assertTrue "c$i: its own" "[ $(wc -l <"$T/differ") -gt 4000 ]"
  done
  same v "$T/in"
  # shellcheck disable=SC2086
  cas 0 rm "$S::c1" $rest
  cas 0 verify "$S"
  stop TERM
  names
  assertEquals 'v v@s ' "$GOT"
  stored
  pages=$((202 / 14)) # of the catalog, which does not shrink; each lies twice
  assertTrue "$before, then $GOT: all was given back" \
    "[ $GOT -le $((before + 2 * pages * 4096)) ]"
  before=$GOT
  # shellcheck disable=SC2086
  cas 0 clone "$S::v@s" $n
  # shellcheck disable=SC2086
  cas 0 rm "$S::c1" $rest
  stored
  assertEquals 'the catalog stays as it is' "$before" "$GOT"
}
# A server of the volume is killed between durable writes; then a program finds
# what they wrote
killed() { # program
  serve "$S::v"
  rm -f "$T/after"
  mkfifo "$T/after"
  { # the client looks at it when the server is gone
    while kill -0 "$PID" 2>/dev/null; do sleep 0.02; done
    "$1" export "$S::v" - >"$T/after" 2>>"$T/err"
  } &
  LOG='Broken pipe'
  client acked "$SOCK" "$T/after" "$PID" 9 100 fua
  wait $!
  stop KILL
}
testDurableWritesToAVolumeSurviveKILL() {
  store || return 0
  cas 0 create "$S::v" 1M
  killed "$NBDSERVE"
  cas 0 verify "$S"
  assertEquals '' "$(cat "$T/out")"
  [ "$SWITCH" = NO_THREADS ] || assertTrue 'a socket is left' "[ -e '$S.ctl' ]"
  serve "$S::v" # in place of which there is a new one
  [ "$SWITCH" = NO_THREADS ] || names
  [ "$SWITCH" = NO_THREADS ] || assertEquals 'v ' "$GOT"
}
# Each kill falls on unflushed requests: a store that loses the last writes was
# noticed in 18 of 18 runs, one that loses only the last trims in 5 of 6
testKillLosesNothingThatWasAcknowledged() {
  unless NO_THREADS && store || return 0
  client kills "$T/k" 10 '' "$NBDSERVE" --idle-exit 5 -U "$T/k" \
    --create 4195081 "$T/flat"
  cas 0 create "$S::v" 4195081
  client kills "$T/k" 50 "$S" "$NBDSERVE" --idle-exit 5 -U "$T/k" "$S::"
  cas 0 verify "$S"
  assertEquals '' "$(cat "$T/out")"
}
word() { # at that offset of the store, as a number
  echo $((0x$(od -An -v -tx1 -j "$1" -N 4 "$S" | tr -d ' \n')))
}
# Where things are in a store with the default log, in its first group
slot() { echo $((19 * 1048576 + $1 * 4096)); }
twin() { echo $(($1 + 128)); } # of a page: the slot with its second copy
digest() { echo $((18 * 1048576 + $1 * 32)); }
block() { # slot: what is in it
  dd if="$S" bs=4096 skip=$((19 * 256 + $1)) count=1 2>/dev/null | cksum
}
flip() { # offset: one bit there
  byte=$(($(od -An -tu1 -j "$1" -N 1 "$S") ^ 16))
  # shellcheck disable=SC2059
  printf "$(printf '\\%03o' $byte)" |
    dd of="$S" bs=1 seek="$1" conv=notrunc 2>/dev/null
}
flip_both() { # slot offset: the same bit in both copies of a page
  flip $(($(slot "$1") + $2))
  flip $(($(slot "$(twin "$1")") + $2))
}
entry() { # slot number: what a page of a map or above the records names
  word $(($(slot "$1") + 32 + 4 * $2))
}
# SHELF and CATALOG: the pages of the catalog, from its root to the first one
# with records; MAP and LEAF: those of the map of its first volume
pages_of_first() {
  SHELF=$(word 56)
  SHELF="$SHELF $(entry "$SHELF" 0)"
  CATALOG=$(entry "${SHELF#* }" 0)
  MAP=$(word $(($(slot "$CATALOG") + 32 + 16)))
  for _ in 3 2; do MAP="$MAP $(entry "${MAP##* }" 0)"; done
  LEAF=$(entry "${MAP##* }" 0)
}
# A store with a volume whose block 20 (of 40) lies in slot DATA, which map page
# LEAF says
damageable() {
  store || return 1
  noise 163840 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  pages_of_first
  DATA=$(entry "$LEAF" 20)
  assertEquals "$(dd if="$T/in" bs=4096 skip=20 count=1 2>/dev/null | cksum)" \
    "$(block "$DATA")"
}
# Opens the store for writing, and closes it
touch_store() {
  cas 1 rm "$S::nix"
  says 'no such volume'
}
# Are reads checked, as they are where the processor helps?  Is it told to?
checks() {
  [ ! -e "$T/checks" ] || return 0
  cp "$S" "$T/checks" # which is damaged
  "$NBDSERVE" export "$T/checks::v" "$T/log" 2>/dev/null || return 0
  rm "$T/checks"
  case $SWITCH in NO_HWSHA | POSIX_ONLY) return 1 ;; esac
  if grep -qw sha_ni /proc/cpuinfo 2>/dev/null; then
    case $CC in
      *tcc*) ;;
      "$HOST_CC") fail 'reads are not checked' ;;
    esac
  fi
  return 1
}
reports() { # what verify has to say, with blanks for tabs
  cas 3 verify "$S"
  assertEquals "$1" "$(tr '\t' ' ' <"$T/out")"
}
loses() { # what of volumes cannot be read; for that some page may be named, too
  cas 3 verify "$S"
  assertEquals "$1" "$(tr '\t' ' ' <"$T/out" | grep -v '^- 0 0 a page')"
}
testDamagedDataIsFoundAndIsAnErrorOfItsBlockOnly() {
  damageable || return 0
  flip $(($(slot "$DATA") + 100))
  reports 'v 81920 4096 the data is not what it was'
  if checks; then
    cas 1 export "$S::v" "$T/out2"
    says 'export v.*: '
  fi
  DISK=$S::v SIZE=163840
  LOG='^nbdserve: .*client .*off=81920 .*(put/output|I/O) error'
  simple "OK.1=$(od -An -tx1 -j 81919 -N 1 "$T/in" | tr -d ' ')" READ,1,81919,1
  if checks; then
    simple "OK.1=$(od -An -tx1 -j 81919 -N 1 "$T/in" | tr -d ' ') EIO.2 \
OK.3=$(od -An -tx1 -j 86016 -N 1 "$T/in" | tr -d ' ')" \
      READ,1,81919,1 READ,2,81920,1 READ,3,86016,1
  fi
  serve --no-verify "$S::v"
  if needs nbdcopy; then
    does nbdcopy "$URI" "$T/copy"
    assertEquals 'the one bit' 1 "$(cmp -l "$T/in" "$T/copy" | wc -l)"
  fi
}
testWritingHealsADamagedBlock() {
  damageable || return 0
  flip $(($(slot "$DATA") + 100))
  cas 3 verify "$S"
  DISK=$S::v SIZE=163840
  raw 00000003 "$(ask GO)" "ZEROES,1,81920,4096" DISC,0,0,0
  cas 0 verify "$S"
  cas 0 import "$S::again" "$T/in"
  same again "$T/in"
}
testDamagedDigestIsFoundAndTheDataIsThere() {
  damageable || return 0
  flip $(($(digest "$DATA") + 3))
  reports 'v 81920 4096 the data is not what it was'
  serve --no-verify "$S::v"
  if needs nbdcopy; then
    does nbdcopy "$URI" "$T/copy"
    assertTrue "cmp '$T/in' '$T/copy'"
  fi
}
# A bit of one copy, in whatever page: nobody hears of it, and the next opening
# for writing mends it, or repair if it is in the copy that nobody had to read.
# The place of the digest has two copies, too.
testOneBadCopyOfAPageIsMendedInSilence() {
  damageable || return 0
  cp "$S" "$T/sound"
  for page in $SHELF $CATALOG $MAP $LEAF; do
    for at in $(($(slot "$page") + 77)) $(($(slot "$(twin "$page")") + 4095)) \
      $(($(digest "$page") + 31)) $(digest "$(twin "$page")"); do
      flip "$at"
      cp "$S" "$T/damaged"
      cas 0 verify "$S"
      assertEquals "page $page, $at" '' "$(cat "$T/out")"
      same v "$T/in"
      assertTrue 'readers write nothing' "cmp '$S' '$T/damaged'"
      touch_store
      [ "$at" != $(($(slot "$(twin "$page")") + 4095)) ] || cas 0 repair "$S"
      # Only superblocks and the log may differ, as repair begins that anew.
      assertTrue "page $page, $at: mended" \
        "cmp -i '$(digest 0)' '$S' '$T/sound'"
      cp "$T/sound" "$S"
    done
  done
}
# Of a page whose copies are both wrong, what is below it cannot be read, until
# it is written.  The rest of the store is as ever, before and after an opening
# for writing.
testBothCopiesOfALeafWrongCostItsBlocksOnly() {
  damageable || return 0
  noise 50000 >"$T/other"
  cas 0 import "$S::other" "$T/other"
  pages_of_first
  flip_both "$LEAF" 200
  loses 'v 0 163840 the map cannot be read'
  for round in 1 2; do
    cas 1 export "$S::v" "$T/out2"
    says 'export v.*: '
    same other "$T/other"
    cas 0 import "$S::new$round" "$T/other"
    same new$round "$T/other"
    loses 'v 0 163840 the map cannot be read'
  done
  cas 0 snapshot "$S::other@s"
  cas 0 rm "$S::new1"
  DISK=$S::v SIZE=163840
  LOG='^nbdserve: .*client .*(put/output|I/O) error'
  simple 'EIO.1 EIO.2' READ,1,81920,1 WRITE,2,81921,1 61
  simple 'OK.3' ZEROES,3,81920,4096
  simple 'OK.4=00 EIO.5' READ,4,86015,1 READ,5,86016,1
  loses 'v 0 81920 the map cannot be read
v 86016 77824 the map cannot be read'
  serve "$S::v"
  if needs nbdcopy; then
    does nbdcopy "$T/in" "$URI"
    stop TERM
    cas 0 verify "$S"
    same v "$T/in"
  fi
}
# The upper pages of a map, likewise; all that is below them is one leaf here
testBothCopiesOfAnUpperPageWrongCostOneVolume() {
  damageable || return 0
  noise 50000 >"$T/other"
  cas 0 import "$S::other" "$T/other"
  pages_of_first
  cp "$S" "$T/sound"
  for page in $MAP; do
    cp "$T/sound" "$S"
    flip_both "$page" 33
    loses 'v 0 163840 the map cannot be read'
    cas 0 create "$S::more" 5
    loses 'v 0 163840 the map cannot be read'
    same other "$T/other"
    cas 0 rm "$S::v"
    cas 0 verify "$S"
    same other "$T/other"
  done
}
# There is no end to what is below a root: who clears it block by block does not
# come back
testSnapshotOfAVolumeWhoseRootIsLostEnds() {
  damageable || return 0
  flip_both "${MAP%% *}" 33
  cas 0 snapshot "$S::v@s"
  for name in v v@s; do
    cas 1 export "$S::$name" "$T/out2"
    says "export $name.*: "
  done
  cas 0 resize "$S::v" 5000
  cas 0 rm "$S::v@s" v
  cas 0 verify "$S"
}
# The maps in memory are good, but not those that will be read next time
testDamagedMapOfAServedStoreIsFound() {
  unless NO_THREADS && damageable || return 0
  serve "$S::"
  cas 0 verify "$S"
  for page in $LEAF ${MAP##* } $CATALOG; do
    sound=$(block "$page")
    flip $(($(slot "$page") + 200))
    cas 0 verify "$S"
    assertEquals "page $page: mended" "$sound" "$(block "$page")"
    flip_both "$page" 300
    reports '- 0 0 a page of a map or the catalog is damaged'
    flip_both "$page" 300
    cas 0 verify "$S"
  done
  flip_both "$CATALOG" 300
  cas 0 create "$S::more" 5 # now there is a new one
  cas 0 verify "$S"
  same v "$T/in"
}
# Volumes of a page of the catalog whose copies are both wrong are lost, but not
# by opening the store: that takes a word
testDamagedCatalogIsRefused() {
  damageable || return 0
  LOG='damaged, something may be missing'
  n=''
  for i in $(seq 14 30); do n="$n $i"; done
  cas 0 snapshot "$S::v@s"
  # shellcheck disable=SC2086
  cas 0 clone "$S::v@s" $n
  pages_of_first
  cp "$S" "$T/sound"
  for page in $CATALOG $SHELF; do
    cp "$T/sound" "$S"
    flip_both "$page" 40
    cp "$S" "$T/copy"
    names
    left=''
    [ "$page" != "$CATALOG" ] || left='26 27 28 29 30 '
    assertEquals "page $page: -r" "$left" "$GOT"
    says "$S: damaged, something may be missing"
    [ -z "$left" ] || same 30 "$T/in"
    reports '- 0 0 a page of a map or the catalog is damaged'
    for command in "create $S::n 5" "rm $S::30" "repair $S"; do
      # shellcheck disable=SC2086
      cas 3 $command
      says "$S: .*\`nbdserve repair "
    done
    run "$S::"
    assertEquals "page $page: served" 3 $STATUS
    says "$S: "
    assertTrue "page $page: untouched" "cmp '$S' '$T/copy'"
    run --accept-loss repair "$S" # and may say that there was damage
    assertTrue "repair: $STATUS" "[ $STATUS = 0 ] || [ $STATUS = 3 ]"
    cas 0 verify "$S"
    names
    assertEquals "page $page: what is left" "$left" "$GOT"
    cas 0 import "$S::v" "$T/in"
    cas 0 verify "$S"
    same v "$T/in"
    [ -z "$left" ] || same 30 "$T/in"
  done
}
# A snapshot whose volume's record was in a page that is lost
testLostVolumeOfASnapshotDoesNotKeepTheOthersShut() {
  damageable || return 0
  LOG='damaged, something may be missing'
  n=''
  for i in $(seq 14 30); do n="$n $i"; done
  cas 0 snapshot "$S::v@1"
  # shellcheck disable=SC2086
  cas 0 clone "$S::v@1" $n
  cas 0 snapshot "$S::v@2"
  pages_of_first
  flip_both "$CATALOG" 40
  same 30 "$T/in"
  run --accept-loss repair "$S"
  same 30 "$T/in"
  cas 0 create "$S::v" 5
}
# A block whose digest is damaged is not shared with who writes the same data,
# and does not get into an id
testDamagedDigestIsNotSealedIntoAnId() {
  unless NO_THREADS && damageable || return 0
  cas 0 snapshot "$S::v@s"
  cp "$S" "$T/sound"
  cas 0 seal "$S::v@s"
  sound=$(cat "$T/out")
  cp "$T/sound" "$S"
  flip $(($(digest "$DATA") + 20))
  serve "$S::"
  sleep 0.5 # for the index
  stored
  before=$GOT
  cas 0 import "$S::w" "$T/in"
  stored
  assertTrue 'all others were found equal' "[ $GOT -lt $((before + 60000)) ]"
  cas 1 seal "$S::v@s"
  says 'seal v@s: (Input/output|I/O) error$'
  cas 0 snapshot "$S::w@s"
  cas 0 seal "$S::w@s"
  assertEquals "$sound" "$(cat "$T/out")"
}
# Puts bytes, in hex, at an offset of both superblocks (slot 0) or of both
# copies of a page, and makes the sums right again
forge() { # slot offset bytes
  python3 -c 'import hashlib, sys
slot, at, new = int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
with open(sys.argv[1], "r+b") as f:
    for i in (0, 1):
        base = 19 * 2**20 + (slot + 128 * i) * 4096 if slot else i * 2**20
        f.seek(base)
        p = bytearray(f.read(4096))
        p[at:at + len(new)] = new
        if slot:
            p[20:32] = bytes(12)
            digest = hashlib.sha256(p).digest()
            p[20:32] = digest[:12]
        else:
            p[480:512] = hashlib.sha256(p[:480]).digest()
        f.seek(base)
        f.write(p)
        if slot:
            f.seek(18 * 2**20 + (slot + 128 * i) * 32)
            f.write(digest)' "$S" "$@"
}
testForgedStoresAreRefusedOrSound() {
  needs python3 && damageable || return 0
  cp "$S" "$T/sound"
  root=${SHELF%% *}
  forge "$root" 32 "$(printf %08x "$root")" # it is below itself
  names
  assertEquals 'a root below itself' '' "$GOT"
  cas 3 create "$S::w" 5
  says "$S: "
  cp "$T/sound" "$S"
  forge "${MAP%% *}" 36 "$(printf %08x "${MAP%% *}")"
  same v "$T/in" # and lost is what nobody needs
  cas 0 create "$S::w" 5
  same v "$T/in"
  cas 0 verify "$S"
  forge 0 32 0000000000000000 # its pages are newer
  cas 3 create "$S::w" 5
  says "$S: "
  cp "$T/sound" "$S"
  forge 0 32 8000000000000000
  cas 0 create "$S::w" 5
  same v "$T/in"
  cp "$T/sound" "$S"
  forge 0 32 ffffffffffffffff # no change is left
  cas 3 create "$S::w" 5
  says "$S: "
  for size in 7fffffffffffffff ffffffffffffffff; do
    cp "$T/sound" "$S"
    forge "$CATALOG" $((32 + 8)) $size
    cas 3 list "$S"
    says "$S: "
  done
  for name in 1b5b 61220a 5c c29b; do # after the name's first byte
    cp "$T/sound" "$S"
    forge "$CATALOG" $((32 + 113)) $name
    cas 3 --json list "$S"
    says "$S: "
  done
}
testStoreThatWasCutShortIsRepaired() {
  store || return 0
  noise 3000000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cp "$S" "$T/sound"
  truncate -s -1300000 "$S" # nothing is there as yet
  cas 3 create "$S::w" 5
  says 'repair'
  cas 0 list "$S"
  cas 0 repair "$S"
  cas 0 create "$S::w" 5
  same v "$T/in"
  cp "$T/sound" "$S"
  truncate -s -3000000 "$S"
  cas 3 verify "$S"
  cas 3 repair "$S"
  cas 0 create "$S::w" 5
  cas 3 verify "$S"
  cas 0 rm "$S::v"
  cas 0 verify "$S"
  cas 0 import "$S::v" "$T/in"
  same v "$T/in"
}
testStoreOfAnotherVersionIsNamedSo() {
  store || return 0
  forge 0 8 03
  cp "$S" "$T/copy"
  for verb in list verify repair '--accept-loss repair'; do
    # shellcheck disable=SC2086
    cas 1 $verb "$S"
    says "^nbdserve: $S: a store of another format version"
  done
  assertTrue 'untouched' "cmp '$S' '$T/copy'"
}
testDamagedSuperblocksAreMendedFromTheOther() {
  damageable || return 0
  cp "$S" "$T/sound"
  for at in 0 1048576; do
    for bit in 0 50 479 511; do
      flip $((at + bit))
      cp "$S" "$T/damaged"
      cas 0 verify "$S"
      assertEquals '' "$(cat "$T/out")"
      same v "$T/in"
      assertTrue 'readers write nothing' "cmp '$S' '$T/damaged'"
      touch_store
      assertTrue "$at, $bit: mended" "cmp -n 512 -i 0:1048576 '$S' '$S'"
      assertTrue "$at, $bit: all else" "cmp -i 1049088 '$S' '$T/sound'"
    done
  done
  flip 50
  flip 1048626
  cp "$S" "$T/copy"
  cas 3 list "$S"
  says "$S: "
  cas 3 create "$S::m" 5
  says "$S: "
  cas 3 --accept-loss repair "$S"
  says "$S: damaged beyond repair"
  assertTrue 'untouched' "cmp '$S' '$T/copy'"
}
# What somebody else has written over a superblock is not taken away from him
testForeignBytesInPlaceOfASuperblockAreKept() {
  damageable || return 0
  for at in 0 1048576; do
    noise 4096 | dd of="$S" bs=1 seek=$at conv=notrunc 2>/dev/null
    cp "$S" "$T/copy"
    same v "$T/in"
    cas 3 create "$S::n" 5
    says "$S: .*\`nbdserve repair "
    assertTrue "$at: untouched" "cmp '$S' '$T/copy'"
    cas 0 repair "$S"
    cas 0 create "$S::n$at" 5
    cas 0 verify "$S"
    same v "$T/in"
  done
}
# A page in the midst of what was flushed is rotten: opened for reading the rest
# is there; it is not written before somebody says so, by repair
testDamagedLogIsReadOnly() {
  store || return 0
  noise 163840 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 create "$S::w" 1M
  serve "$S::w"
  mkfifo "$T/after"
  { # the client looks at it when the server is gone
    while kill -0 "$PID" 2>/dev/null; do sleep 0.02; done
    cp "$S" "$T/saved"
    "$NBDSERVE" export "$S::w" - >"$T/after" 2>>"$T/err"
  } &
  LOG='Broken pipe|damaged, something may be missing'
  client acked "$SOCK" "$T/after" "$PID" 9 1000 fua
  wait $!
  stop KILL
  cp "$T/saved" "$S" # as it was when the server was killed
  log=$(($(word 44) % 4096 * 4096 + 2097152)) # the first page to replay
  assertEquals 'LOG1' \
    "$(dd if="$S" bs=1 skip=$((log + 4032)) count=4 2>/dev/null)"
  cas 0 verify "$S"
  flip $((log + 8192 + 20)) # an entry of some page behind it
  cp "$S" "$T/copy"
  reports '- 0 0 the log is damaged'
  same v "$T/in"
  run list "$S"
  says "$S: damaged, something may be missing"
  cas 3 create "$S::n" 5
  says "$S: .*\`nbdserve repair $S"
  assertTrue 'untouched' "cmp '$S' '$T/copy'"
  serve -r "$S::"
  stop TERM
  cas 0 repair "$S"
  same v "$T/in"
  cas 0 create "$S::n" 5
  cas 0 verify "$S"
}
# Makes the store for the table below: v of 40 blocks, some of which changed
# since v@s; other; and w, of which the log alone knows what is in it, in three
# pages and an empty one that says that they are durable.
mixed_store() {
  store && unless NO_THREADS && needs python3 || return 1
  noise 163840 >"$T/v@s"
  noise 50000 >"$T/other"
  cas 0 import "$S::v" "$T/v@s"
  cas 0 snapshot "$S::v@s"
  cas 0 import "$S::other" "$T/other"
  cas 0 create "$S::w" 196608
  serve "$S::"
  cp "$T/v@s" "$T/v"
  client brim "$SOCK" v "$T/v" over:6 flush
  stop TERM
  serve "$S::w"
  client brim "$SOCK" w "$T/w" add:1 flush add:1 flush add:1 flush
  sleep 1.5 # for the page that vouches for the last one
  stop KILL
}
# What each place of a store costs that is destroyed: nothing, or the blocks
# that lie or are described there; for a page, both of its copies must go.
testWhichDestroyedSectorCostsWhat() {
  unhurried || return 0
  if [ "${SANITIZER-}" = thread ]; then
    skip 'one thread at a time'
    return 0
  fi
  cat >"$T/table.py" <<'END'
import concurrent.futures, os, random, struct, subprocess, sys
nbdserve, store, data, step = sys.argv[1:5]
MIB, names = 2**20, ["v", "v@s", "other", "w"]
sound = open(store, "rb").read()
random.seed(5)
want = {n: open(data + "/" + n, "rb").read() for n in names}

def u32(at): return struct.unpack_from(">I", sound, at)[0]
def u64(at): return struct.unpack_from(">Q", sound, at)[0]
def slot(x): return 19 * MIB + 4096 * x
def digest(x): return 18 * MIB + 32 * x
def kids(x): return [u32(slot(x) + 32 + 4 * i) for i in range(1016)]

# pages: slot -> the blocks below it, by name; blocks: slot -> the same
pages, blocks, ids = {}, {}, {}
def add(to, x, name, these):
    to.setdefault(x, {}).setdefault(name, set()).update(these)
def walk(x, level, name):
    found = set()
    for i, kid in enumerate(kids(x)):
        if kid and level:
            found |= walk(kid, level - 1, name)
        elif kid:
            found.add(i)
            add(blocks, kid, name, {i})
    add(pages, x, name, found)
    return found
root = u32(56)
middle = kids(root)[0]
records = kids(middle)[0]
catalog = [root, middle, records]
volumes = []
for at in range(slot(records) + 32, slot(records) + 4032, 288):
    if u32(at):
        name = sound[at + 112:at + 278].rstrip(b"\0").decode()
        name = "v@" + name if u32(at + 4) & 1 else name
        volumes.append(name)
        ids[u32(at)] = name
        if u32(at + 16): walk(u32(at + 16), 3, name)
assert sorted(volumes) == sorted(names), volumes
live, pages_of_log = u64(40), []
while True:
    at = 2 * MIB + live % 4096 * 4096
    if sound[at + 4032:at + 4036] != b"LOG1" or u64(at + 4040) != live: break
    there = set()
    for e in range(at, at + 48 * u32(at + 4036), 48):
        assert ids[u32(e)] == "w"
        there.add(u64(e + 8))
        add(blocks, u32(e + 4), "w", {u64(e + 8)})
    pages_of_log.append((at, there))
    live += 1
assert len(pages_of_log) == 4 and not pages_of_log[3][1]
apart = set().union(*(there for _, there in pages_of_log))
if len(apart) < sum(len(there) for _, there in pages_of_log):
    sys.exit(77) # two writes met: what is lost then is harder to say
assert len(blocks) > 40 + 13 + 48, len(blocks)

def run(*words):
    p = subprocess.run([nbdserve, *words], capture_output=True, timeout=20)
    assert p.returncode in (0, 1, 3), (words, p)
    return p.returncode, p.stdout.decode(errors="replace"), p.stderr.decode()
def damage(work):
    """What verify names, and w's blocks that are not what they were"""
    code, out, _ = run("verify", work)
    lost, other = {}, 0
    for row in out.splitlines():
        name, off, length, why = row.split("\t")
        if name == "-": other += 1; continue
        off, length = int(off), int(length)
        lost.setdefault(name, set()).update(
            range(off // 4096, (off + length + 4095) // 4096))
    assert code == (3 if lost or other else 0), (code, out)
    for n in names:
        if n in lost:
            assert run("export", work + "::" + n, "-")[0] == 1 or \
                not checks, n + " can be exported"
            continue
        code, _, err = run("export", work + "::" + n, work + ".out")
        assert code == 0, (n, err)
        got = open(work + ".out", "rb").read()
        wrong = {i // 4096 for i in range(0, len(got), 4096)
                 if got[i:i + 4096] != want[n][i:i + 4096]}
        assert len(got) == len(want[n]) and (n == "w" or not wrong), n
        if wrong:
            assert not any(any(got[4096 * i:4096 * i + 4096]) for i in wrong)
            lost["w gone"] = wrong
    return lost, other

cases = []
def hurt(*case, **more): cases.append((len(cases), case, more))
def try_case(case):
    work = f"{store}.{case[0]}"
    try:
        hurt_now(work, *case[1], **case[2])
    except (AssertionError, subprocess.TimeoutExpired) as e:
        print(*case[1][:3], repr(e), flush=True)
    for end in "", ".out":
        if os.path.exists(work + end): os.remove(work + end)
def hurt_now(work, what, length, offsets, expected, says_log=False,
             refused=False):
    with open(work, "wb") as f:
        f.write(sound)
        for off in offsets:
            f.seek(off)
            f.write(random.randbytes(length))
    lost, other = damage(work)
    assert lost == expected, (lost, expected)
    assert bool(other) == says_log, other
    code, _, err = run("rm", work + "::nix")
    if refused:
        assert code == 3 and "`nbdserve repair " in err, err
        code, out, err = run("repair", work)
        assert code == (3 if set(expected) - {"w gone"} else 0), (out, err)
    else:
        assert code == 1 and "no such volume" in err, err
    lost, other = damage(work)
    assert lost == expected and not other, ("later", lost, expected, other)

# Are reads checked?
with open(store + ".checks", "wb") as f:
    f.write(sound)
    f.seek(slot(next(x for x in blocks if "v" in blocks[x])))
    f.write(b"x" * 512)
checks = run("export", store + ".checks::v", "-")[0] == 1

def within(of, lo, hi):
    """What of blocks has its slot, or that slot its digest, there"""
    lost = {}
    for x in of:
        if lo <= x < hi:
            for name in blocks.get(x, {}):
                lost.setdefault(name, set()).update(blocks[x][name])
    return lost
for length in 512, 4096:
    for place in 0, MIB:
        hurt("superblock", length, [place], {}, says_log=True, refused=True)
    for i, (at, there) in enumerate(pages_of_log):
        for part in range(0, 4096, length):
            if part and part < 3584 and i: continue
            is_used = part >= 3584 or part < 48 * len(there) or length == 4096
            gone = {"w gone": there} if there and is_used else {}
            hurt(f"log page {i}", length, [at + part], gone,
                 says_log=bool(gone), refused=bool(gone))
    hurt("dead log page", length, [pages_of_log[0][0] - 4096], {})
    hurt("log page to come", length, [pages_of_log[3][0] + 4096], {})
    for x in sorted({x // (length // 32) for x in [*blocks, *pages, *catalog]}):
        lo, hi = x * (length // 32), (x + 1) * (length // 32)
        hurt("digests", length, [digest(lo)], within(blocks, lo, hi))
    for x in [*pages, *catalog]:
        hurt("a page", length, [slot(x)], {})
        hurt("a twin", length, [slot(x + 128)], {})
        if x in pages:
            hurt("a page and its twin", length, [slot(x), slot(x + 128)],
                 pages[x])
    for x in random.sample(sorted(blocks), 8):
        for part in range(0, 4096, length)[::3]:
            hurt("data", length, [slot(x) + part], blocks[x])
    free = max(u32(52) - 3, 600)
    hurt("free", length, [slot(free)], {})
    hurt("digest of free", length, [digest(free) // length * length], {})
assert len(cases) > 100
cases = cases[::int(step)]
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(try_case, cases))
END
  while
    mixed_store || return 0
    is_variant && step=6 || step=1
    python3 "$T/table.py" "$NBDSERVE" "$S" "$T" "$step" >"$T/table" 2>&1
    [ $? = 77 ]
  do
    rm "$S"
  done
  assertEquals '' "$(head -n 20 "$T/table")"
}
testFullStoreIsENOSPCForTheWriteOnly() {
  unless POSIX_ONLY || return 0 # without fallocate the reserve is not backed
  needs qemu-io mount root && unless NO_THREADS && store || return 0
  mkdir "$T/m"
  if ! mount -t tmpfs -o size=32M none "$T/m" 2>/dev/null; then
    skip 'no tmpfs may be mounted'
    return 0
  fi
  S=$T/m/store
  cas 0 init "$S"
  noise 4000000 >"$T/in"
  noise 33554432 >"$T/much"
  head -c 4194304 "$T/much" >"$T/some"
  cas 0 import "$S::v" "$T/in"
  cas 1 import "$S::much" "$T/much"
  says 'import much.*: no space left; what it took is free in the store'
  names
  assertEquals 'v ' "$GOT"
  cas 0 create "$S::w" 32M
  serve "$S::"
  LOG='^nbdserve: .*client .* No space left'
  timeout 60 qemu-io -f raw "$(uri w)" -c "write -s $T/much 0 32M" \
    >"$T/log" 2>&1
  assertContains "$(cat "$T/log")" 'No space left'
  cas 0 export "$S::v" "$T/out"
  assertTrue 'reads go on' "cmp '$T/in' '$T/out'"
  does qemu-io -f raw "$(uri w)" -c 'discard 0 32M' -c flush \
    -c "write -s $T/some 0 4M" -c flush
  assertNotContains "$(cat "$T/log")" 'No space left'
  stop TERM
  assertEquals 'status' 0 $STATUS
  cas 0 export "$S::w" "$T/out"
  assertTrue 'trimmed, then written' "cmp -n 4194304 '$T/some' '$T/out'"
  same v "$T/in"
  cas 0 verify "$S"
  umount -l "$T/m"
}
# A file system of its own, $T/m, with a store in it; ended by no_disk
disk() { # file system, MiB, option of mkfs...
  unless NO_THREADS && needs root mount && store || return 1
  mkdir "$T/m"
  if [ "$1" = tmpfs ]; then
    mount -t tmpfs -o "size=$2M" none "$T/m"
  else
    needs "mkfs.$1" || return 1
    truncate -s "$2M" "$T/image"
    fs=$1
    shift 2
    "mkfs.$fs" -q "$@" "$T/image" >"$T/log" 2>&1 &&
      mount -o loop "$T/image" "$T/m"
  fi 2>"$T/why" || { skip "it may not be mounted: $(cat "$T/why")"; return 1; }
  S=$T/m/store
}
no_disk() {
  [ -z "$JOBS" ] || stop KILL
  umount -l "$T/m"
}
brim() { # VOLUME step...: against its shadow
  export=$1
  shift
  client brim "$SOCK" "$export" "$T/shadow.$export" "$@"
}
crash() { # kill -9, and it has to open for writing again
  stop KILL
  assertEquals 'messages' '' "$(grep -Ev "$LOG" "$T/err" | head -n 5)"
  : >"$T/err"
  serve "$S::" && [ -n "$URI" ] || return
  [ -S "$S.ctl" ] || # which a full file system may have no room for
    assertTrue 'no control socket, and not a word' "grep -q '[.]ctl' '$T/err'"
}
# A command, which the server does if it has a control socket: STATUS, WHY
ordered() {
  [ -S "$S.ctl" ]
  served=$?
  [ $served = 0 ] || stop TERM
  timeout 60 "$NBDSERVE" "$@" >"$T/out" 2>"$T/why"
  STATUS=$? WHY=$(tail -n 2 "$T/why")
  [ $served = 0 ] || serve "$S::"
}
order() {
  ordered "$@"
  assertEquals "nbdserve $* ($WHY)" 0 $STATUS
}
# A snapshot v@s may be refused, no more; what it holds may not change
snapshot_if_it_fits() {
  ordered snapshot "$S::v@s"
  if [ $STATUS = 0 ]; then
    cp "$T/shadow.v" "$T/shadow.v@s"
    brim v over:200 trim:50 zero:50 over:50 flush check && brim v@s check &&
      crash && brim v check && brim v@s check && order rm "$S::v@s"
  else
    assertContains 'why' "$WHY" 'No space left' && order list "$S" &&
      assertNotContains 'refused, but there' "$(cat "$T/out")" v@s
  fi
}
give_back() { [ "$SWITCH" = POSIX_ONLY ] || order gc "$S"; } # by punching holes
# The file system is full: by what the store holds, then by what others do.
# ENOSPC is no reason to lose anything, nor to refuse what needs no space.
is_full() {
  LOG='No space left|[.]ctl'
  cas 0 init "$S" && cas 0 create "$S::v" 512M && cas 0 create "$S::w" 64M &&
    serve "$S::" && brim w add:50 && brim v fill check &&
    brim w over:100 trim:20 zero:20 check || return
  brim v trim:400 flush must:20 over:300 flush check && crash &&
    brim v check trim:50 && brim w check trim:200 flush must:20 &&
    snapshot_if_it_fits || return
  brim v trim:200 flush must:20 flush && order rm "$S::w" && give_back &&
    rm "$T/shadow.w" || return
  head -c 512M /dev/zero >"$T/m/filler" 2>/dev/null
  brim v over:200 trim:100 flush over:200 zero:50 flush check &&
    snapshot_if_it_fits && crash && brim v check trim:50 over:50 check &&
    give_back || return
  cat /dev/zero >>"$T/m/filler" 2>/dev/null
  brim v trim:20 over:100 check && crash && brim v check || return
  rm "$T/m/filler"
  sync # some file systems give the space back later
  # btrfs gives back what was removed when it has a mind to
  new=add:2
  if [ "$1" = btrfs ]; then new=; else brim v must:20 add:2; fi || return
  brim v over:20 flush check && order create "$S::w" 64M &&
    brim w $new check && crash && brim v check && brim w check || return
  stop TERM
  assertEquals 'status' 0 $STATUS && cas 0 verify "$S"
}
full() {
  case $1$SWITCH in
    ext4POSIX_ONLY | tmpfsPOSIX_ONLY) ;; # without fallocate
    *) ! is_variant || { skip 'no other than in the plain build'; return 0; } ;;
  esac
  disk "$@" || return 0
  is_full "$1"
  no_disk
}
testStoreOnAFullExt4() { full ext4 96; }
testStoreOnAFullExt3() { full ext3 96; }
testStoreOnAFullXfs() { full xfs 300; }
testStoreOnAFullBtrfs() {
  unless POSIX_ONLY || return 0 # which cannot ask to be overwritten in place
  full btrfs 128
}
testStoreOnAFullTmpfs() { full tmpfs 96; }
# Tests of a program for another machine take the one for this; else the other
# is big-endian.  What one has made, also of a log that a KILL left, the other
# finds.
testStoresOfAnotherMachineAreTheSame() {
  other=$here/nbdserve
  if [ "$CC" = "$HOST_CC" ]; then
    qemu=$(command -v qemu-s390x-static || command -v qemu-s390x || :)
    needs s390x-linux-gnu-gcc "${qemu:-qemu-s390x}" || return 0
    does s390x-linux-gnu-gcc -O1 -static -o "$T/s390x" "$here/nbdserve.c" \
      -lpthread
    other=$T/other
    emulated "$qemu" "$T/s390x" >"$other"
    chmod +x "$other"
  fi
  store || return 0
  noise 500000 >"$T/in"
  cas 0 import "$S::native" "$T/in"
  cas 0 snapshot "$S::native@s"
  cas 0 seal "$S::native@s"
  id=$(cat "$T/out")
  does "$other" export "$S::native" "$T/copy"
  assertTrue 'read there' "cmp '$T/in' '$T/copy'"
  does "$other" verify "$S"
  does "$other" import "$S::foreign" "$T/in"
  does "$other" snapshot "$S::foreign@s"
  same foreign@s "$T/in"
  cas 0 verify "$S"
  does "$other" seal "$S::foreign@s"
  assertEquals 'equal contents have equal ids' "$id" "$(cat "$T/log")"
  cas 0 create "$S::v" 1M
  killed "$other"
  does "$other" verify "$S"
  does "$other" init "$T/other.store"
  does "$other" import "$T/other.store::v" "$T/in"
  S=$T/other.store
  same v "$T/in"
  cas 0 verify "$S"
  cas 0 rm "$S::v"
  cas 0 create "$S::v" 1M
  was=$NBDSERVE NBDSERVE=$other
  killed "$was"
  NBDSERVE=$was
  cas 0 verify "$S"
}
simulates() {
  unless NO_CAS || return 1
  [ "${SANITIZER-}" != thread ] || { skip 'one thread only'; return 1; }
}
# The same histories in each run: what they find is not left to chance.  make
# crash goes on with others.
testPlaceOfTheLogThatCannotBeWrittenIsPassedOver() {
  unless NO_CAS || return 0
  fault badlog "$T/pool"
}
testAListHasEachVolumeOnceWhileOthersCome() {
  unless NO_CAS || return 0
  fault listed "$T/pool"
}
testADryRunKnowsWhatIsOpen() {
  unless NO_CAS || return 0
  fault dryrun "$T/pool"
}
testAStoreThatLacksFreeSlotsOnlyIsWhole() {
  unless NO_CAS || return 0
  fault cutshort "$T/pool"
}
testGcThatFailsHalfwayTouchesNothingInUse() {
  unless NO_CAS || return 0
  fault gcfails "$T/pool"
}
testARepairThatFailsHalfwayMakesNothingWorse() {
  unless NO_CAS || return 0
  fault mending "$T/pool"
}
testAnIdIsOfTheDataWhereADigestCannotBeRead() {
  unless NO_CAS || return 0
  fault sealed "$T/pool"
}
testAnIdOwesNothingToWhatAnOlderSnapshotHasLost() {
  unless NO_CAS || return 0
  fault lostbase "$T/pool"
}
testADamagedBlockIsMendedByAnEqualOne() {
  unless NO_CAS || return 0
  fault twice "$T/pool"
}
testAfterAFailedSyncOrWriteOfTheLogNothingIsWrittenOrBelieved() {
  unless NO_CAS || return 0
  fault failed "$T/pool"
}
testMoreThanEightLostPagesAreNotTakenWithoutAWord() {
  unless NO_CAS || return 0
  fault manylost "$T/pool"
}
testWhatIsBelowALostPageIsUnlikeAnythingUntilItIsWritten() {
  unless NO_CAS || return 0
  fault lostpage "$T/pool"
}
testALeafThatCannotBeReadOnceIsReadTheNextTime() {
  unless NO_CAS || return 0
  fault reread "$T/pool"
}
testADigestThatCannotBeReadIsNamedAndWrittenAnew() {
  unless NO_CAS || return 0
  fault nodigest "$T/pool"
}
testALogThatFollowsALostSuperblockKeepsAStoreShut() {
  unless NO_CAS || return 0
  fault outdated "$T/pool"
}
testAnOlderCopyThatNoDigestVouchesForIsNotBelieved() {
  unless NO_CAS || return 0
  fault oldcopy "$T/pool"
}
testForgedRecordsAreNotSealedOrNotLoaded() {
  unless NO_CAS || return 0
  fault records "$T/pool"
}
testAVolumeThatIsBeingFilledIsNotLogged() {
  unless NO_CAS || return 0
  fault hidden "$T/pool"
}
testSuperblocksWithABadSectorBehindThemAreRead() {
  unless NO_CAS || return 0
  fault badsector "$T/pool"
}
testADeviceWithAnythingOnItIsNotMadeAStore() {
  unless NO_CAS || return 0
  fault device "$T/pool"
}
testALogBeginsBehindAllThatWasLeftThere() {
  unless NO_CAS || return 0
  fault newlog "$T/pool"
}
testWritesThatAFullStoreRefusesDoNotSync() {
  unless NO_CAS || return 0
  fault refused "$T/pool"
}
testACheckpointThatLacksMemoryLosesNoSlots() {
  unless NO_CAS || return 0
  fault undone "$T/pool"
}
testTheLastPairsAreForWhatGivesBackAndThenForRemoving() {
  unless NO_CAS || return 0
  fault reserve "$T/pool"
}
testWhatIsLostLeavesTheReserveAlone() {
  unless NO_CAS || return 0
  fault lossfull "$T/pool"
}
testSpaceCountsOnAFullDiskOnlyIfItCanBeWritten() {
  unless NO_CAS || return 0
  fault halfthere "$T/pool"
}
testCheckpointsHaveNumbersAboveAllThatThereWere() {
  unless NO_CAS || return 0
  fault numbers "$T/pool"
}
testAnEntryWithoutItsDigestLeavesItsSlotFree() {
  unless NO_CAS || return 0
  fault confirm "$T/pool"
}
testAPageOfAnotherPlaceIsNotBelieved() {
  unless NO_CAS || return 0
  fault otherleaf "$T/pool"
}
testAPageWithoutADigestIsReadFromTheCopyThatIsWhole() {
  unless NO_CAS || return 0
  fault nodigests "$T/pool"
}
testWhatHasNoMeaningIsWrittenAsZeroes() {
  unless NO_CAS || return 0
  fault fields "$T/pool"
}
testANewLogLeavesAloneWhatTheReplayNeeds() {
  unless NO_CAS || return 0
  fault tinylog "$T/pool"
}
testWhatTheLastLogPageDropsIsFreeAfterASync() {
  unless NO_CAS || return 0
  fault lastpage "$T/pool"
}
testVerifyOfAVolumeThatGoesGoesOnWithTheNextOne() {
  unless NO_CAS || return 0
  fault removed "$T/pool"
}
testAFlushedBlockThatRotsIsNotTheOlderOne() {
  unless NO_CAS || return 0
  fault rotten "$T/pool"
}
testBlocksThatTheIndexTakesForTheSameAreCompared() {
  unless NO_CAS || return 0
  fault alike "$T/pool"
}
testNothingIsGivenBackBeforeThatIsNoted() {
  unless NO_CAS && unless POSIX_ONLY || return 0
  fault noted "$T/pool"
}
testAPageOfTheCatalogStaysWhileItHasARecord() {
  unless NO_CAS || return 0
  fault last "$T/pool"
}
testAChangeSeesWhatItsEarlierPartsHaveMade() {
  unless NO_CAS || return 0
  fault one "$T/pool"
}
testAChangeLeavesAloneWhatItsStrictestPartMust() {
  unless NO_CAS || return 0
  fault strict "$T/pool"
}
testAnIdIsOfDataThatHasToBeReadAgain() {
  unless NO_CAS || return 0
  fault idread "$T/pool"
}
testABlockThatIsNotInMemoryStaysInTheIndex() {
  unless NO_CAS || return 0
  fault indexed "$T/pool"
}
testABlockWhoseDigestCannotBeReadIsNotKnownToBeGood() {
  unless NO_CAS || return 0
  fault notgood "$T/pool"
}
testWhatRemovingFreesCanBeUsedWhereThereWasNoSpace() {
  unless NO_CAS || return 0
  fault room "$T/pool"
}
testWhatWaitsToBeFreeIsNotWrittenOver() {
  unless NO_CAS || return 0
  fault pending "$T/pool"
}
testWhatWaitsToBeFreeKeepsItsDigest() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault digests "$T/pool"
}
testAGroupIsNotBrokenBecauseTheOneBeforeItIs() {
  unless NO_CAS || return 0
  fault group "$T/pool"
}
testWritingHealsBelowALostPageAnywhere() {
  unless NO_CAS || return 0
  fault upper "$T/pool"
}
testOneWrongLetterOfASuperblockIsDamage() {
  unless NO_CAS || return 0
  fault letter "$T/pool"
}
testWhatCannotBeReadCountsAsChanged() {
  unless NO_CAS || return 0
  fault notclean "$T/pool"
}
testADamagedEndKeepsAVolumeFromGrowing() {
  unless NO_CAS || return 0
  fault nogrowth "$T/pool"
}
testRemovingWaitsForAStepOfVerifyOnly() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault unpinned "$T/pool"
}
testTheEndOfAVolumeInsideABlockIsReplayed() {
  unless NO_CAS || return 0
  fault oddend "$T/pool"
}
testTwoSealsAtOnceTakeTheSpaceOfOne() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault sealtwo "$T/pool"
}
testClosingMakesDurableWhatWasAcknowledged() {
  unless NO_CAS || return 0
  fault closing "$T/pool"
}
testAVolumeOfWhichAPageIsLostIsNotTakenForAnEmptyOne() {
  unless NO_CAS || return 0
  fault nohole "$T/pool"
}
testVerifyMissesNothingThatARollbackMoves() {
  unless NO_CAS || return 0
  fault rollback "$T/pool"
}
testExtentsStatVerifyAndListAtTheirEdges() {
  unless NO_CAS || return 0
  fault edges "$T/pool"
}
testWhatCannotBeReadForAWhileIsNotTakenBack() {
  unless NO_CAS || return 0
  fault unread "$T/pool"
}
testTwoPagesOfTheLogThatAreGoneAreDamageIfOneWasDurable() {
  unless NO_CAS || return 0
  fault gaps "$T/pool"
}
testAPageOfACheckpointThatNeverWasIsNotBelieved() {
  unless NO_CAS || return 0
  fault future "$T/pool"
}
testDataWithAWrongDigestIsNotTakenForTheSame() {
  unless NO_CAS || return 0
  fault misled "$T/pool"
}
testVerifyReadsWhatWasReadBefore() {
  unless NO_CAS || return 0
  fault anew "$T/pool"
}
testDamageIsNamedForAllWhoShareIt() {
  unless NO_CAS || return 0
  fault shared "$T/pool"
}
testBothCopiesOfAPageAreWrittenAnewWhereOneIsWrong() {
  unless NO_CAS || return 0
  fault healed "$T/pool"
}
testChangesInOneSeeThoseBeforeThem() {
  unless NO_CAS || return 0
  fault inorder "$T/pool"
}
testDigestsInABadSectorAreAllWrittenAnew() {
  unless NO_CAS || return 0
  fault sector "$T/pool"
}
testNothingIsTakenWhereAWriteHasFailed() {
  unless NO_CAS || return 0
  fault passed "$T/pool"
}
testSpaceThatIsTakenAgainIsNotTakenForGivenBack() {
  unless NO_CAS || return 0
  fault regained "$T/pool"
}
testTheNewerOfTwoCopiesThatAreWholeIsBelieved() {
  unless NO_CAS || return 0
  fault newest "$T/pool"
}
testBlocksThatCannotBeOnesAreLostForGood() {
  unless NO_CAS || return 0
  fault named "$T/pool"
}
testASealThatFailsLeavesNothing() {
  unless NO_CAS || return 0
  fault unsealed "$T/pool"
}
testWhatIsTrimmedOnAFullStoreCanBeWrittenAtOnce() {
  unless NO_CAS || return 0
  fault waiting "$T/pool"
}
testANameIsNotThatOfALongerOne() {
  unless NO_CAS || return 0
  fault prefix "$T/pool"
}
testSpaceThatGetsFreeOnAFullDeviceIsForPagesToo() {
  unless NO_CAS || return 0
  fault freed "$T/pool"
}
testWithoutAThreadWhoAsksDoesTheWork() {
  unless NO_CAS || return 0
  fault alone "$T/pool"
}
testZeroesHealWhatIsLostWhichIsNoHole() {
  unless NO_CAS || return 0
  fault zeroed "$T/pool"
}
testAPageThatCannotBeReadForAWhileIsNotGivenUp() {
  unless NO_CAS || return 0
  fault awhile "$T/pool"
}
testWhatRecoveryHasCheckedIsFoundByTheIndex() {
  unless NO_CAS || return 0
  fault checked "$T/pool"
}
testACleanStoreOpensWhereNothingCanBeWrittenAgain() {
  unless NO_CAS || return 0
  fault nowhere "$T/pool"
}
testAnIdForgetsWhatWasTrimmed() {
  unless NO_CAS || return 0
  fault trimmed "$T/pool"
}
testOffsetsRiseAsFarAsAStoreMayGrow() {
  unless NO_CAS || return 0
  fault offsets "$T/pool"
}
testAStoreIsSyncedBeforeItsOtherSuperblockIsWritten() {
  unless NO_CAS || return 0
  fault underway "$T/pool"
}
testWhoWaitsForAVolumeThatIsRenamedIsWoken() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault woken "$T/pool"
}
testAVolumeMayBeUsedAsSoonAsItIsThere() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault seen "$T/pool"
}
testVerifyNeverTellsOfMoreThanThereIs() {
  unless NO_CAS || return 0
  fault bounded "$T/pool"
}
testACheckpointThatCannotBeWrittenIsGivenUp() {
  unless NO_CAS || return 0
  fault givenup "$T/pool"
}
testNoFlushOfAStoreWaitsForManySyncs() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault flushes "$T/pool"
}
testANameThatIsGoingIsNotFreeYet() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault going "$T/pool"
}
testASnapshotThatLostItsVolumeLosesItsId() {
  unless NO_CAS || return 0
  fault orphan "$T/pool"
}
testADamagedBlockIsNeverReadAsSound() {
  unless NO_CAS || return 0
  fault away "$T/pool"
}
testWhatIsWrittenLiesWhereTheFormatSays() {
  unless NO_CAS || return 0
  fault format "$T/pool"
}
testANameIsFreeInTheChangeThatRemovesIt() {
  unless NO_CAS || return 0
  fault replaced "$T/pool"
}
testEachPlaceOfASuperblockIsLookedAtByItself() {
  unless NO_CAS || return 0
  fault places "$T/pool"
}
testCallsThatDoNotComeToTheirEndSaySo() {
  unless NO_CAS || return 0
  fault ended "$T/pool"
}
testWhatIsTrimmedCanBeWrittenWhereThereWasNoSpace() {
  unless NO_CAS || return 0
  fault again "$T/pool"
}
testADigestIsWrittenBehindItsData() {
  unless NO_CAS || return 0
  fault ahead "$T/pool"
}
testVerifyBesideACheckpointFindsNothing() {
  unless NO_CAS && unless NO_THREADS || return 0
  fault beside "$T/pool"
}
testANewerPageThatNoDigestVouchesForIsNotBelieved() {
  unless NO_CAS || return 0
  fault vouched "$T/pool"
}
testAFullLogAndAFullDiskAreENOSPC() {
  unless NO_CAS || return 0
  fault logfull "$T/pool"
}
testGcKeepsWhatAFullDiskNeeds() {
  unless NO_CAS || return 0
  fault kept "$T/pool"
}
testGcHoldsNobodyUpWhileItGivesSpaceBack() {
  unless NO_CAS && unless NO_THREADS && unless POSIX_ONLY || return 0
  fault slowgc "$T/pool"
}
testNoPowerCutLosesWhatWasFlushed() {
  simulates && build simulator || return 0
  cuts=${POWER_CUTS:-500}
  ! is_variant || cuts=100
  [ -z "${SANITIZER-}" ] || cuts=10 # each takes thirty times as long
  for seed in 1 1000 2000 3000; do
    does "$W/simulator" cuts "$cuts" $seed
  done
  ! is_variant || return 0
  # A cut took back the space of digests, and somebody else has it.
  does "$W/simulator" cuts 100 1001779
  # A clone and its snapshot, in one change, of what was killed when it shrank
  does "$W/simulator" cuts 100 1014507
  # A new segment in a group whose digests cannot be written
  does "$W/simulator" cuts 200 3005028
  # Checkpoints that lacked space, and a clock that was late
  does "$W/simulator" enospc 200 12
  # Data for which there was no space, though its digest could be written
  does "$W/simulator" cuts 200 11011487
  # Digests that could not be read for a while, and were older ones then
  does "$W/simulator" cuts 200 41581368
  # Space was given back before that of segments that recovery had to reach.
  does "$W/simulator" cuts 200 40740987
  # Two superblocks, one of them of a process that was killed, on their way
  does "$W/simulator" cuts 20 778166
  # Space that was given back and is taken again counts too early (C18)
  does "$W/simulator" taken 120 45
}
testEverySystemCallMayFailOnce() {
  simulates && build simulator || return 0
  if is_variant; then
    does "$W/simulator" errors 1
    return
  fi
  does "$W/simulator" calls 1
  does "$W/simulator" calls 2
}
# The same thousand in each run; make mutate has more, under sanitizers
testMutatedStoresAreRefusedOrSound() {
  simulates && build mutate || return 0
  count=1000
  ! is_variant || count=200
  [ -z "${SANITIZER-}" ] || count=400
  does "$W/mutate" $count 1
}
testWhatIsTrueOnlyWhileASyncRuns() {
  unless NO_CAS && unless NO_THREADS && build syncs || return 0
  does "$W/syncs" "$T/store"
}
testControlSocketOfASuccessorIsKept() {
  store && unless NO_THREADS || return 0
  serve "$S::"
  rm "$S.ctl"
  echo other >"$S.ctl"
  stop TERM
  assertEquals 'of another server' other "$(cat "$S.ctl")"
}
testControlSocketOfAStrangerIsNotUsed() {
  store && needs python3 || return 0
  [ "$(id -u)" = 0 ] || { skip 'not root'; return; }
  python3 - "$S" <<'END' &
import fcntl, os, socket, sys
store = open(sys.argv[1], "r+")
fcntl.flock(store, fcntl.LOCK_EX)
s = socket.socket(socket.AF_UNIX)
s.settimeout(20)
s.bind(sys.argv[1] + ".ctl")
os.chown(sys.argv[1] + ".ctl", 65534, 65534)
s.listen()
try:
    c = s.accept()[0]
    c.recv(9000, socket.MSG_WAITALL)
    open(sys.argv[1] + ".got", "w")
    c.send(b"\0")
except socket.timeout:
    pass
END
  await "[ -S '$S.ctl' ]"
  await "[ \"\$(stat -c %u '$S.ctl')\" = 65534 ]"
  cas 1 list "$S"
  says "$S.ctl: belongs neither"
  assertFalse 'the stranger got descriptors' "[ -e '$S.got' ]"
  kill $!
  wait $! 2>/dev/null || :
}
testMessagesNameWhatIsMissingInAStore() {
  store || return 0
  cas 0 create "$S::v" 1M
  run "$S::nix"
  assertEquals 1 "$STATUS"
  says "$S::nix: "
  cas 2 rollback "$S::v"
  says 'rollback v: not a snapshot: that is VOLUME@NAME'
  cas 2 create "$S::a@b" 5
  says 'create a@b 5: a name with @ is a snapshot'
  cas 2 init "$T/x" 5000
  says '5000: not a block size .*4K'
  cas 2 create "$S::w" x
  says 'create x: not a size$'
}

# ==== [13] SERVER (@server) ==================================================

testStaleSocketIsReplaced() {
  serve "$DISK"
  stop KILL
  assertTrue 'left behind' "[ -S '$SOCK' ]"
  start -U "$SOCK" "$DISK"
  client hello "$SOCK"
}
testLiveSocketIsNotReplaced() {
  serve "$DISK"
  cp "$DISK" "$T/other"
  run -U "$SOCK" "$T/other"
  assertEquals 1 "$STATUS"
  says "$SOCK: "
  client hello "$SOCK"
}
testListenerThatNeverAcceptsIsNotReplaced() {
  client full "$T/s" "$NBDSERVE" -U "$T/s" "$DISK"
  assertContains "$(cat "$T/log")" 'not replaced'
}
testEndingServerKeepsTheSocketOfItsSuccessor() {
  serve "$DISK"
  first=$JOB:$PID
  rm "$SOCK"
  start -U "$SOCK" mem:1M
  second=$JOB:$PID JOB=${first%:*} PID=${first#*:}
  stop TERM
  assertEquals 0 "$STATUS"
  client hello "$SOCK"
  assertEquals 1048576 "$(cat "$T/log")"
  JOB=${second%:*} PID=${second#*:}
  stop TERM
  assertFalse 'its own goes' "[ -e '$SOCK' ]"
}
testOneOfThreeServersGetsAStaleSocket() {
  serve "$DISK"
  stop KILL
  ln "$SOCK" "$T/stale"
  for round in 1 2 3 4 5; do
    rm -f "$T"/up? "$T"/over?
    ln -f "$T/stale" "$SOCK"
    for i in 1 2 3; do
      {
        timeout -s KILL 20 "$NBDSERVE" -U "$SOCK" -P "$T/up$i" mem:1M \
          >/dev/null 2>>"$T/err"
        echo $? >"$T/over$i"
      } &
    done
    await "[ \$(cat '$T'/up? '$T'/over? 2>/dev/null | wc -l) -ge 3 ]"
    assertEquals "servers in round $round" 1 "$(cat "$T"/up? | wc -l)"
    assertEquals "losers in round $round" 1 "$(sort -u "$T"/over?)"
    client hello "$SOCK"
    # shellcheck disable=SC2046
    kill -TERM $(cat "$T"/up?)
    wait
  done
  says 'not replaced'
}
testFileInPlaceOfASocketIsNotReplaced() {
  echo precious >"$T/file"
  run -U "$T/file" "$DISK"
  assertEquals 1 "$STATUS"
  says "$T/file: "
  assertEquals precious "$(cat "$T/file")"
}
testTooLongSocketPathIsRefusedWithTheLimit() {
  long=$T/$(printf %0120d 0)
  run -U "$long" "$DISK"
  assertNotEquals 0 "$STATUS"
  says "$long: .*10[0-9]"
}
testAddressesMayStandInBrackets() {
  tcp || return 0
  start -p 0 -i '[127.0.0.1]' "$DISK"
  client hello "$(echo "$URI" | sed 's,nbd://\(.*\)/,\1,')"
  stop TERM
  run -p 0 -i "$(printf %0100d 1)" "$DISK"
  assertEquals 'no address is that long' 1 "$STATUS"
  says 'Invalid argument'
}
testPortZeroPrintsTheChosenPort() {
  tcp || return 0
  start -p 0 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  port=${port%/}
  assertEquals "nbd://127.0.0.1:$port/" "$URI"
  assertNotEquals 0 "$port"
  client hello "127.0.0.1:$port"
  [ ! -e /proc/net/if_inet6 ] || ! grep -q ' lo$' /proc/net/if_inet6 ||
    client hello "[::1]:$port"
}
testPortInUseIsNamed() {
  tcp || return 0
  start -p 0 -i 127.0.0.1 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  run -p "${port%/}" -i 127.0.0.1 mem:1M
  assertEquals 1 "$STATUS"
  says "${port%/}: "
}
testBindToAnotherAddressWarnsOnce() {
  tcp || return 0
  start -p 0 -i 0.0.0.0 "$DISK"
  stop TERM
  assertEquals 1 "$(wc -l <"$T/err")"
  says authentication
}
testOnceEndsAfterTheLastClient() {
  serve -1 "$DISK"
  client many "$SOCK" 1
  wait "$JOB"
  assertEquals 0 $?
  JOBS=
}
testIdleExitEndsItWithoutClients() {
  serve --idle-exit 1 "$DISK"
  wait "$JOB"
  assertEquals 0 $?
  assertFalse 'socket gone' "[ -e '$SOCK' ]"
  JOBS=
}
# The time without clients begins when the last one has left
testIdleTimeBeginsWhenTheLastClientHasLeft() {
  build client || return 0
  serve --idle-exit 1 "$DISK"
  client stay "$SOCK" 1500
  sleep 0.5
  assertTrue 'half a second later' "kill -0 '$PID'"
  await "! kill -0 '$PID' 2>/dev/null"
  wait "$JOB"
  assertEquals 0 $?
  JOBS=
}
# Who waits for a slot is told of once, in the server's log
testWaitingForASlotIsToldOnce() {
  unless NO_THREADS || return 0
  serve -m 1 "$DISK"
  build client || return 0
  "$W/client" stay "$SOCK" 600 &
  first=$!
  sleep 0.2
  client hello "$SOCK"
  wait $first
  client hello "$SOCK"
  assertEquals "$(cat "$T/err")" 1 "$(grep -c 'slots.*wait' "$T/err")"
  assertEquals 1 "$(wc -l <"$T/err")"
  : >"$T/err"
}
testOnceServesWhoWaitedForTheOnlySlot() {
  LOG='^nbdserve: .* all slots are taken; the next client has to wait'
  serve -1 -m 1 "$DISK"
  client next "$SOCK"
  wait "$JOB"
  assertEquals 0 $?
  JOBS=
}
testUSR1DoesNotPostponeTheIdleExit() {
  LOG='^{"clients":0,'
  serve --idle-exit 1 "$DISK"
  n=0
  while [ $n -lt 40 ] && kill -USR1 "$PID" 2>/dev/null; do
    n=$((n + 1))
    sleep 0.2
  done
  assertTrue "still there after $n signals" "[ $n -lt 40 ]"
  [ $n = 40 ] || { wait "$JOB"; assertEquals 0 $?; JOBS=; }
}
testConnectionsOverTheLimitWaitForASlot() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .* all slots are taken; the next client has to wait'
  serve -m 3 "$DISK"
  client limit "$SOCK" 3
}
testShortOfDescriptorsItRecovers() {
  cat >"$T/limited" <<END
#!/bin/sh
ulimit -n 40
exec "$NBDSERVE" "\$@"
END
  chmod +x "$T/limited"
  was=$NBDSERVE
  NBDSERVE=$T/limited
  LOG='^nbdserve: '
  serve "$DISK"
  NBDSERVE=$was
  client crowd "$SOCK" 150
  client spin "$SOCK" "$PID"
}
# Prints the tests that leave in $CORPUS what a client sent
transcripts() {
  awk '
    /^# ==== \[/ { on = /@(wire|handshake|transmission)\)/; name = "" }
    on && /^test[A-Z][A-Za-z0-9]*\(\)/ { name = $1; sub(/\(.*/, "", name) }
    name != "" && /(^|[ {])(talk|haggle|simple|structured|extended|refused) / {
      print name
      name = ""
    }' "$self"
}
# The input of all transcripts, those run already and those left out, whole and
# cut somewhere (SEED), must neither end the server nor stay in its memory.  It
# finds a leak or an end without luck: in 18 of 24 rounds the input is whole.
testBadInputNeitherHurtsOthersNorLeaks() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .* all slots are taken; the next client has to wait'
  transcripts >"$W/names"
  while read -r name; do
    ! is_variant || [ ! -e "$CORPUS/60" ] || break # that many will do there
    case "
$SELECTED
" in *"
$name
"*) continue ;; esac
    $name </dev/null
    rm -r "$T"
    setUp
  done <"$W/names"
  LOG='^nbdserve: .*client'
  serve "$DISK"
  is_variant && rounds=8 || rounds=24
  client badinput "$SOCK" "$PID" $SLACK "$rounds" "$CORPUS"/*
}
testClientsThatStopHalfwayHarmNobody() {
  unless NO_THREADS || return 0
  LOG='^nbdserve: .*client'
  serve "$DISK"
  for how in silent greeting option payload request data replies; do
    client rude "$SOCK" $how
  done
}
testAThousandConnectionsInTurn() {
  serve "$DISK"
  client many "$SOCK" 1000
}
testMoreClientsThanSlotsAreAllServed() {
  LOG='^nbdserve: .* all slots are taken; the next client has to wait'
  serve -m 8 "$DISK"
  client crowd "$SOCK" 150
}
testAcknowledgedWritesSurviveTERM() {
  truncate -s 1M "$DISK"
  serve "$DISK"
  client acked "$SOCK" "$DISK" "$PID" 15 3000
  wait "$JOB"
  assertEquals 'status' 0 $?
  JOBS=
}
testTERMWithIdleClientsEndsAtOnce() {
  unless NO_THREADS || return 0
  serve "$DISK"
  client idle "$SOCK" "$PID"
  wait "$JOB"
  assertEquals 'status' 0 $?
  JOBS=
}
testLibraryRefusesWrongArguments() { unit arguments; }
testServerThatCannotBeMadeIsNULL() { unit failed; }
testLogMayAskForTheTotals() { unit totals; }
testStopAndWakeEndRun() { unit stop; }
testWakeIsSeenBehindWhateverElseHappens() { unit poked; }
testPortThatOneLoopbackHasTakenIsNotPicked() { fault loopbacks "$DISK"; }
testVanishedTcpPeersAreNoticed() {
  needs loopback || return 0
  fault keepalive "$DISK"
}
# A TCP client that has sent more than is answered gets what was answered: the
# end must not come as a reset, which overtakes data
testTERMOverTcpLosesNoReply() {
  tcp && unless NO_THREADS || return 0
  start -p 0 -i 127.0.0.1 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  client term "127.0.0.1:${port%/}" "$PID"
  wait "$JOB"
  assertEquals 0 $?
  JOBS=
}
testBadMagicOverTcpLosesNoReply() {
  tcp || return 0
  LOG='^nbdserve: .*client'
  start -p 0 -i 127.0.0.1 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  client magic "127.0.0.1:${port%/}"
}
testFreeEndsTheClientsThatAreLeft() { unit free; }
testListThatIsNotReadHoldsNobodyUp() { unit listed; }
testStoppingLeavesAloneWhoReadsNothing() { unit deaf; }
testStopAnswersWhatIsInFlight() { unit inflight; }
testServersOfOneProcessAreApart() { unit two; }
# With one slot: who stops halfway has it for --stall, who has left not at all
testAClientThatEndsHoldsNoSlot() {
  tcp || return 0
  LOG='^nbdserve: .*(client .*timed out|all slots are taken)'
  start -p 0 -i 127.0.0.1 -m 1 --stall 1 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  client slots "127.0.0.1:${port%/}" "$PID"
}
testListenersOfAFullServerTakeTurns() {
  unless NO_THREADS || return 0
  unit turns
}
testThatClientsWaitIsSaidOnce() {
  unless NO_THREADS || return 0
  unit once
}
testFreeFlushesWhatRunHasNot() { unit unflushed; }
testExportsMayBeAddedWhileItStops() {
  unless NO_THREADS || return 0
  unit adding
}
testSocketThatIsBeingMadeIsNotStale() { fault stale "$DISK"; }
# Unlike that of a unix socket, the receiving side of a TCP socket is not shut
# down: its thread has to see by itself that the server stops
testTERMWithIdleTcpClientsEndsAtOnce() {
  tcp && unless NO_THREADS && build client || return 0
  start -p 0 -i 127.0.0.1 "$DISK"
  port=${URI#nbd://127.0.0.1:}
  from=$(clock)
  client idle "127.0.0.1:${port%/}" "$PID"
  wait "$JOB"
  assertEquals 'status' 0 $?
  took=$(($(clock) - from))
  assertTrue "took $took ms" "[ $took -lt 3000 ]" # the grace has 5,000
  JOBS=
}
testTwoAtOnceDoNotShareTheOnlySlot() { unit sametime; }
testALastFlushThatFailsIsToldByRun() { unit oneflush; }

# ==== [14] CLI (@cli) ========================================================

testUsageErrorsExit2WithAMessage() {
  for args in '' '-p' '-p x' '-p 70000' '-b 3:4:5' '-b 512' '--size x' \
    '--size -1' '-o 1Q' '-t x' '-m -1' '--cache maybe' '--fd x' \
    '--ready-fd x' '--create x' '--idle-exit x' '-e a one two'; do
    target=$DISK
    [ -n "$args" ] || target=
    # shellcheck disable=SC2086
    run $args $target
    assertEquals "status of: $args" 2 "$STATUS"
    assertEquals "output of: $args" '' "$(cat "$T/out")"
    says '[a-z]'
  done
}
testOnceAndIdleExitDoNotGoWithACommand() {
  for option in -1 --once '--idle-exit 1'; do
    # shellcheck disable=SC2086
    run $option --run true "$DISK"
    assertEquals "$option --run" 2 "$STATUS"
    says 'not together'
    # shellcheck disable=SC2086
    run $option "$DISK" -- true
    assertEquals "$option --" 2 "$STATUS"
    says 'not together'
  done
}
testDescriptorsThatAreNotOpenAreUsageErrors() {
  cp "$DISK" "$T/copy"
  for n in 2 3 4 5 6 7 8 9; do
    run --ready-fd $n --run true "$DISK" 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
    assertEquals "--ready-fd $n" 2 "$STATUS"
    says "ready-fd $n: "
    assertTrue "--ready-fd $n changed it" "cmp '$DISK' '$T/copy'"
    [ $n != 2 ] || continue
    run --fd $n "$DISK" 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-
    assertEquals "--fd $n" 2 "$STATUS"
    says "fd $n: "
    assertTrue "--fd $n changed it" "cmp '$DISK' '$T/copy'"
  done
}
testUnknownOptionsAreNamed() {
  for option in --bogus -Z --; do
    [ $option != -- ] || continue
    run "$option" "$DISK"
    assertEquals 2 "$STATUS"
    says "nbdserve: .*$option"
  done
}
testVersionIsTheHeaders() {
  version=$(sed -n 's/^#define NBDSERVE_VERSION "\(.*\)"/\1/p' \
    "$here/nbdserve.h")
  for option in -V --version; do
    run "$option"
    assertEquals 0 "$STATUS"
    assertEquals "nbdserve $version" "$(head -n 1 "$T/out" | cut -d' ' -f1-2)"
  done
}
testHelpFits80ColumnsAndNamesEveryOption() {
  run --help
  assertEquals 0 "$STATUS"
  assertEquals '' "$(grep -E '^.{81}' "$T/out")"
  for option in unix port bind stdin fd read-only export offset size create \
    cache threads max-conn once idle-exit run fork pidfile ready-fd stats \
    json version help; do
    assertTrue "--$option" "grep -q -e '--$option' '$T/out'"
  done
  cp "$T/out" "$T/long"
  run -h
  assertTrue '-h is --help' "cmp '$T/out' '$T/long'"
}
testPrivateSocketIsPrivateAndRemoved() {
  mkdir "$T/run"
  was=$(umask)
  export XDG_RUNTIME_DIR="$T/run"
  umask 0
  start "$DISK"
  umask "$was"
  unset XDG_RUNTIME_DIR
  SOCK=${URI#nbd+unix:///?socket=}
  assertContains "$SOCK" "$T/run/"
  # shellcheck disable=SC2012
  assertEquals 'srw-------' "$(ls -ld "$SOCK" | cut -c1-10)"
  # shellcheck disable=SC2012
  assertEquals 'drwx------' "$(ls -ld "${SOCK%/*}" | cut -c1-10)"
  client hello "$SOCK"
  stop TERM
  assertEquals 'all is gone' '' "$(ls "$T/run")"
  # Without both variables it is in /tmp, and not in the root directory.
  env -u XDG_RUNTIME_DIR -u TMPDIR "$NBDSERVE" "$DISK" \
    --run 'echo "$uri"' >"$T/out"
  assertContains 'no variable' "$(cat "$T/out")" 'socket=/tmp/nbd'
}
testUriOfANamedTargetHasItsName() {
  serve -e x n=mem:1M
  assertEquals "nbd+unix:///n?socket=$SOCK" "$URI"
  client hello "$SOCK" n
}
testRunPassesTheStatusOn() {
  run --run 'exit 7' "$DISK"
  assertEquals 7 "$STATUS"
  run --run true "$DISK"
  assertEquals 0 "$STATUS"
  run --run 'kill -9 $$' "$DISK"
  assertEquals 137 "$STATUS"
}
testRunSetsTheVariables() {
  build client || return 0
  run -e name --run 'echo "$uri"; echo "$exportname"; echo "$unixsocket"
    echo "$nbd"; '"$W/client"' hello "$unixsocket" name' "$DISK"
  assertEquals 0 "$STATUS"
  sock=$(sed -n 3p "$T/out")
  assertEquals "nbd+unix:///name?socket=$sock" "$(sed -n 1p "$T/out")"
  assertEquals name "$(sed -n 2p "$T/out")"
  assertContains "$(sed -n 4p "$T/out")" "$sock"
  assertEquals 65536 "$(sed -n 5p "$T/out")"
  assertFalse 'the socket is gone' "[ -e '$sock' ]"
}
testCommandAfterDashesGetsTheUri() {
  run -U "$T/s" "$DISK" -- printf '%s|' 'a b' {} x{}x
  assertEquals 0 "$STATUS"
  uri="nbd+unix:///?socket=$T/s"
  assertEquals "a b|$uri|x${uri}x|" "$(cat "$T/out")"
  run "$DISK" -- sh -c 'exit 5'
  assertEquals 5 "$STATUS"
  run "$DISK" -- "$T/absent"
  assertNotEquals 0 "$STATUS"
  says "$T/absent: "
}
testNotifySocketIsToldWhenItListens() {
  needs python3 || return 0
  cat >"$T/notify.py" <<'END'
import os, socket, subprocess, sys, time
for name in sys.argv[2] + "/notify", "@nbdserve-%d" % os.getpid():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.settimeout(10)
    s.bind(name.replace("@", "\0"))
    p = subprocess.Popen([sys.argv[1], "-q", "mem:1M"],
                         env=dict(os.environ, NOTIFY_SOCKET=name),
                         stdout=subprocess.DEVNULL)
    assert s.recv(100) == b"READY=1"
    time.sleep(float(sys.argv[3]))
    p.terminate()
    assert p.wait() == 0
END
  # The thread sanitizer itself loses a signal that comes before a first poll
  wait=0
  [ "${SANITIZER-}" != thread ] || wait=0.5
  does python3 "$T/notify.py" "$NBDSERVE" "$T" $wait
}
testExitWithParent() {
  unless POSIX_ONLY && needs python3 || return 0
  sh -c '"$0" -q --exit-with-parent --pidfile "$1/pid" -U "$1/s" mem:1M &
    while [ ! -s "$1/pid" ]; do sleep 0.02; done' "$NBDSERVE" "$T" >/dev/null
  waits() { ! kill -0 "$(cat "$T/pid" 2>/dev/null)" 2>/dev/null; }
  for _ in 1 2 3 4 5 6 7 8 9 10; do waits || sleep 0.3; done
  assertTrue 'it has ended' waits
  assertFalse 'its socket is gone' "[ -e '$T/s' ]"
}
testForkReturnsWhenListening() {
  run --fork -U "$T/s" -P "$T/pid" "$DISK"
  assertEquals 0 "$STATUS"
  assertEquals "nbd+unix:///?socket=$T/s" "$(cat "$T/out")"
  client hello "$T/s"
  PID=$(cat "$T/pid")
  assertTrue 'the server runs' "kill -TERM $PID"
  await "! kill -0 $PID 2>/dev/null"
  assertFalse 'socket gone' "[ -e '$T/s' ]"
  assertFalse 'pidfile gone' "[ -e '$T/pid' ]"
}
testPidfileReplacesOnlyWhatMayBeAPidfile() {
  cp "$DISK" "$T/image"
  printf 'six lines\n' >"$T/text"
  printf '12 13\n' >"$T/numbers"
  for file in image text numbers; do
    cp "$T/$file" "$T/was"
    run -P "$T/$file" "$DISK"
    assertEquals "$file" 1 "$STATUS"
    says "$T/$file: exists and is not a pidfile; not replaced"
    assertTrue "$file is as it was" "cmp '$T/$file' '$T/was'"
  done
  ln -s "$T/text" "$T/link"
  : >"$T/empty"
  echo 999999 >"$T/left"
  for file in empty left link none; do
    serve -r -P "$T/$file" "$DISK"
    assertEquals "$file" "$PID" "$(cat "$T/$file")"
    stop TERM
    assertFalse "$file is gone" "[ -e '$T/$file' ]"
  done
  assertEquals 'six lines' "$(cat "$T/text")"
}
testPidfileOfARunningServerIsNotTakenOver() {
  serve -P "$T/pid" "$DISK"
  run -P "$T/pid" mem:1M
  assertEquals 4 "$STATUS"
  says "$T/pid: the pidfile of a server that runs"
  assertEquals "$PID" "$(cat "$T/pid")"
  stop TERM
}
testEachSocketsUriIsPrinted() {
  unless NO_TCP || return 0
  OUT=$T/uris
  mkfifo "$OUT"
  spawn -U "$T/s" -p 0 -e x --ready-fd 5 "$DISK" 5>"$T/ready"
  timeout 20 head -n 2 "$OUT" >"$T/both"
  spawned
  assertEquals "nbd+unix:///x?socket=$T/s" "$(head -n 1 "$T/both")"
  assertTrue "$(cat "$T/both")" \
    "sed -n 2p '$T/both' | grep -Eqx 'nbd://127.0.0.1:[0-9]+/x'"
  assertEquals "$(cat "$T/both")" "$(cat "$T/ready")"
  client hello "$(sed -n 's,nbd://\(.*\)/x,\1,p' "$T/both")"
  stop TERM
}
testDamagedStoresEndCommandsAndServersWith3() {
  store || return 0
  noise 8000000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  truncate -s 2M "$S"
  for command in "verify $S" "list $S" "$S::" "repair $S"; do
    # shellcheck disable=SC2086
    cas 3 $command
    says 'damaged(; `nbdserve repair| beyond repair)'
  done
  cas 3 repair --accept-loss "$S"
  says 'damaged beyond repair'
}
testWhatIsNoStoreIsNotWaitedFor() {
  unless NO_CAS || return 0
  serve "$DISK" # locks it
  start=$(date +%s)
  cas 1 list "$DISK"
  says "$DISK: not a store"
  assertTrue 'at once' "[ $(($(date +%s) - start)) -lt 3 ]"
}
testFailedStartLeavesTheOthersPidfileAndSocket() {
  serve -P "$T/pid" "$DISK"
  run -P "$T/pid" -U "$SOCK" "$DISK"
  assertEquals 4 "$STATUS"
  says "$DISK: "
  assertEquals "$PID" "$(cat "$T/pid")"
  client hello "$SOCK"
}
testOtherChildrenThatExitDoNotEndIt() {
  printf '#!/bin/sh\nsleep 0.1 &\nexec "%s" "$@"\n' "$NBDSERVE" >"$T/parent"
  chmod +x "$T/parent"
  was=$NBDSERVE NBDSERVE=$T/parent
  serve "$DISK"
  NBDSERVE=$was
  sleep 0.3
  client hello "$SOCK"
}
testCommandThatIsSuspendedDoesNotEndIt() {
  run --run '(sleep 0.2; kill -CONT $$) & kill -STOP $$; exit 3' "$DISK"
  assertEquals 3 "$STATUS"
}
testForkReportsWhatFails() {
  run --fork -U "$T/s" -P "$T/pid" "$T/absent"
  assertEquals 1 "$STATUS"
  says "$T/absent: "
  assertFalse 'no pidfile' "[ -e '$T/pid' ]"
}
testForkThatCannotTellItsUriLeavesNoServer() {
  needs /dev/full || return 0
  timeout 20 "$NBDSERVE" --fork -U "$T/s" -P "$T/pid" mem:1M \
    >/dev/full 2>>"$T/err"
  assertNotEquals 0 $?
  says output
  if [ "${SANITIZER-}" = thread ]; then # it may lose signals behind a fork
    sleep 1
    [ ! -e "$T/pid" ] || kill -KILL "$(cat "$T/pid")"
    return
  fi
  await "! [ -e '$T/s' ] && ! [ -e '$T/pid' ]" || kill "$(cat "$T/pid")"
}
testReadyFdSpeaksWhenListening() {
  OUT=/dev/null
  spawn --ready-fd 9 -U "$T/s" "$DISK" 9>"$T/ready"
  await "[ -s '$T/ready' ]"
  client hello "$T/s"
  spawned
  assertEquals "nbd+unix:///?socket=$T/s" "$(cat "$T/ready")"
}
testReadyFdIsNotForTheCommand() {
  run --ready-fd 9 --run 'if true >&9; then exit 7; fi' "$DISK" 9>"$T/ready"
  assertEquals 0 "$STATUS"
  assertTrue 'told' "[ -s '$T/ready' ]"
  : >"$T/err" # the shell's message
}
testTERMEndsAClientOnStdin() {
  mkfifo "$T/in"
  IN=$T/in OUT=$T/out
  spawn -s "$DISK"
  exec 9>"$IN"
  await "[ -s '$OUT' ]"
  spawned
  stop TERM
  assertEquals 0 "$STATUS"
  exec 9>&-
}
testTERMEndsAClientOnStdinThatNeverReads() {
  unhurried || return 0
  LOG='^nbdserve: .*client'
  mkfifo "$T/in" "$T/out"
  IN=$T/in OUT=$T/out
  spawn -s "$DISK"
  exec 9>"$IN" 8<"$OUT"
  # shellcheck disable=SC2046
  bytes 00000003 "$(ask GO)" $(seq -f 'READ,%g,0,65536' 20) >&9
  await "[ -s '$T/pid$NSERVE' ]"
  PID=$(cat "$T/pid$NSERVE")
  sleep 0.5
  kill -TERM "$PID"
  await "! kill -0 $PID 2>/dev/null" || kill -KILL "$PID"
  wait "$JOB"
  assertTrue "status $?" "[ $? -le 1 ]"
  exec 9>&- 8<&-
}
testServerStartedWithHUPIgnoredSurvivesIt() {
  printf '#!/bin/sh\ntrap "" HUP\nexec "%s" "$@"\n' "$NBDSERVE" >"$T/nohup"
  chmod +x "$T/nohup"
  was=$NBDSERVE NBDSERVE=$T/nohup
  serve "$DISK"
  NBDSERVE=$was
  kill -HUP "$PID"
  sleep 0.2
  client hello "$SOCK"
}
testSignalsEndItInOrder() {
  for signal in TERM INT HUP; do
    serve -P "$T/pid" "$DISK"
    assertEquals "$PID" "$(cat "$T/pid")"
    stop $signal
    assertEquals "status after $signal" 0 "$STATUS"
    assertFalse "socket after $signal" "[ -e '$SOCK' ]"
    assertFalse "pidfile after $signal" "[ -e '$T/pid' ]"
  done
}
testOptionsThatLackWhatTheyNeedAreExplained() {
  for options in --port --quiet=3 '-s --export'; do
    # shellcheck disable=SC2086
    run $options
    assertEquals "$options" 2 "$STATUS"
    says '^nbdserve: --.*: (lacks its value|takes no value)'
  done
  run "$DISK" --
  assertEquals 2 "$STATUS"
  says 'there must be one command'
  run --run true --run true "$DISK"
  assertEquals 2 "$STATUS"
  says 'there must be one command'
}
testRelativeSocketPathHasAUriThatIsRightEverywhere() {
  was=$PWD
  cd "$T" || return
  start -U sock "$DISK"
  cd "$was" || return
  assertEquals "nbd+unix:///?socket=$T/sock" "$URI"
  client hello "$T/sock"
  stop TERM
  mkdir "$T/$(printf %090d 0)"
  cd "$T/$(printf %090d 0)" || return
  start -U sock "$DISK" # its whole path is too long for an address
  assertEquals 'nbd+unix:///?socket=sock' "$URI"
  client hello sock
  stop TERM
  cd "$was" || return
}
testReadyFdThatCannotBeWrittenIsAFailure() {
  needs /dev/full || return 0
  run -U "$T/s" --ready-fd 7 "$DISK" 7>/dev/full
  assertEquals 1 "$STATUS"
  says 'ready-fd: No space left'
  assertFalse 'the socket is gone' "[ -e '$T/s' ]"
}
testPidfileThatCannotBeWrittenIsNotThere() {
  [ "${SANITIZER-}" != thread ] || { skip 'its runtime writes one'; return 0; }
  (ulimit -f 0; timeout 20 "$NBDSERVE" -U "$T/s" -P "$T/pid" "$DISK"; echo $?) \
    2>&1 | cat >"$T/both"
  assertContains "$(cat "$T/both")" "$T/pid: File too large"
  assertEquals 1 "$(tail -n 1 "$T/both")"
  assertEquals 'files' '' "$(find "$T" -name 'pid*' -o -name s)"
}
testOneServerServesOneStore() {
  store || return 0
  cas 0 create "$S::v" 1M
  cas 0 init "$T/other"
  cas 0 create "$T/other::v" 1M
  run -s "a=$S::v" "b=$T/other::v"
  assertEquals 1 "$STATUS"
  says "$T/other: one store at a time: .*/store is open"
}
testExportDoesNotOverwriteWhatIsBeingServed() {
  store || return 0
  cas 0 create "$S::v" 1M
  cp "$DISK" "$T/copy"
  serve "$DISK"
  cas 4 export "$S::v" "$DISK"
  says "$DISK: in use"
  assertTrue 'unchanged' "cmp '$DISK' '$T/copy'"
}
# The last checkpoint fails: what was flushed is in the log
testStoreThatCannotBeClosedInOrderIsAFailure() {
  needs prlimit qemu-io && store || return 0
  cas 0 create "$S::v" 1M
  LOG='^nbdserve: '
  serve "$S::v"
  does qemu-io -f raw -c 'write -P 7 0 64k' -c flush "$URI"
  prlimit --pid "$PID" --fsize=4096:
  stop TERM
  assertEquals 1 "$STATUS"
  says "$S: not closed in order: File too large"
  cas 0 export "$S::v" "$T/out"
  assertEquals 0707 "$(od -An -tx1 -N 2 "$T/out" | tr -d ' ')"
}
testClosedDescriptorsNeverMeetTheImage() {
  cp "$DISK" "$T/copy"
  bytes 00000003 "$(ask GO)" READ,1,-1,2 99,2,0,0 |
    timeout 20 "$NBDSERVE" -s -vv "$DISK" >"$T/out" 2>&-
  assertEquals 0 $?
  timeout 20 "$NBDSERVE" -vv --run 'exit 3' "$DISK" 0<&- 1>&- 2>&-
  assertEquals 3 $?
  timeout 20 "$NBDSERVE" -vv -1 -U "$T/s" "$DISK" 0<&- 1>&- 2>&- &
  await "[ -S '$T/s' ]"
  client many "$T/s" 1
  wait $!
  assertEquals 0 $?
  assertTrue 'unchanged' "cmp '$DISK' '$T/copy'"
}
testWhatIsListedBehindWithoutIsHidden() {
  all=$FLAGS
  for word in flush:4 fua:8 trim:0x20 zero:0x840 multi-conn:0x100 cache:0x400 \
    fast-zero:0x800 flush,trim:0x24; do
    ARGS="--without ${word%:*}"
    FLAGS=$(printf %04x $((0x$all & ~${word#*:})))
    simple OK.1=6e62 READ,1,0,2
  done
  FLAGS=$all ARGS='--without trim'
  [ "$SWITCH" = NO_FLAT ] || FLAGS=$(printf %04x $((0x$all & ~0x20)))
  simple 'EINVAL.1 OK.2' TRIM,1,0,512 ZEROES,2,0,512
  ARGS='--without list,info,go,structured,list-meta,meta,extended'
  haggle 'list=unsup info=unsup go=unsup structured=unsup listmeta=unsup
    setmeta=unsup extended=unsup' "$(opt LIST)" "$(ask INFO '')" \
    "$(ask GO '')" "$(opt STRUCTURED)" "$(meta LIST_META '')" \
    "$(meta SET_META '' base:allocation)" "$(opt EXTENDED)"
  for words in bogus flush,bogus flush,,fua FLUSH flus flushh; do
    run -s --without $words "$DISK"
    assertEquals "$words" 2 "$STATUS"
    says "without $words: not one of: flush fua trim zero df multi-conn"
  done
}
testFaultsHitTheirShareOfTheirCommand() {
  ARGS='--fault read:EIO:0.25 --fault write:ENOSPC:1'
  set --
  for n in 1 2 3 4 5 6 7 8; do
    set -- "$@" READ,$n,0,2
  done
  talk "$(ask GO '')" "$@" WRITE,20,0,4 61626364 FLUSH,21,0,0 \
    TRIM,22,4096,512 DISC,0,0,0
  assertEquals "$GOT" 2 "$(echo "$GOT" | grep -o EIO | wc -l)"
  assertEquals "$GOT" 6 "$(echo "$GOT" | grep -o =6e62 | wc -l)"
  case $GOT in
    *'.8=6e62 ENOSPC.20 OK.21 OK.22' | *' EIO.8 ENOSPC.20 OK.21 OK.22') ;;
    *) fail "writes or others: $GOT" ;;
  esac
  assertEquals 'what a failed write changed' 6e62 "$(at 0 2)"
  for error in EPERM EIO ENOMEM EINVAL ENOSPC EOVERFLOW ESHUTDOWN; do
    ARGS="--fault all:$error:1"
    refused "$error.1 $error.2 $error.3" FLUSH,1,0,0 ZEROES,2,0,512 CACHE,3,0,9
  done
  ARGS='--fault zero:ENOTSUP:1' # an answer to FAST_ZERO only
  simple 'EINVAL.1 ENOTSUP.2' ZEROES,1,0,512 ZEROES+FAST,2,0,512
  ARGS='--fault all:EIO:0'
  simple OK.1=6e62 READ,1,0,2
  for what in x read read:EIO read:EIO:2 read:EIO:-1 read:EIO:x read:EX:1 \
    reads:EIO:1 read:EIO:1x :EIO:1 read:EIO:nan; do
    run -s --fault $what "$DISK"
    assertEquals "$what" 2 "$STATUS"
    says "fault $what: not (as in --fault CMD:ERR:RATE|one of: )"
  done
}
testDelayedRequestsWaitTogether() {
  unless NO_THREADS || return 0
  ARGS='--delay cache:400'
  set --
  for n in 1 2 3 4 5 6 7 8 9 10 11 12; do
    set -- "$@" CACHE,$n,0,2
  done
  from=$(date +%s%N)
  simple 'OK.1 OK.2 OK.3 OK.4 OK.5 OK.6 OK.7 OK.8 OK.9 OK.10 OK.11 OK.12' "$@"
  ms=$((($(date +%s%N) - from) / 1000000))
  assertTrue "$ms ms" "[ $ms -ge 400 ]"
  assertTrue "one after the other: $ms ms" "[ $ms -lt 4800 ]"
  for what in read read: read:-1 read:x read:1x x:1 read:EIO:1 read:nan; do
    run -s --delay $what "$DISK"
    assertEquals "$what" 2 "$STATUS"
    says "delay $what: not (as in --delay CMD:MS|one of: )"
  done
}
testPassedSocketIsServed() {
  client pair "$NBDSERVE" --fd 3 "$DISK"
  client listener "$T/s" "$NBDSERVE" --fd 3 "$DISK"
}
testSocketActivation() {
  client activate "$T/s" "$NBDSERVE" "$DISK"
  assertEquals 'no URI on stdout' '' "$(cat "$T/log")"
}
testForkServesThePassedSocket() {
  needs python3 || return 0
  cat >"$T/pass.py" <<'END'
import os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
os.dup2(s.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
END
  timeout 20 python3 "$T/pass.py" "$T/passed" "$NBDSERVE" --fork \
    -P "$T/pid" "$DISK" >"$T/out" 2>>"$T/err"
  assertEquals 0 $?
  client many "$T/passed" 4
  kill "$(cat "$T/pid")"
  await "[ ! -e '$T/pid' ]"
}
testTooManyPassedSocketsAreRefused() {
  for n in 33 2147483647 99999999999; do
    timeout 20 sh -c 'LISTEN_PID=$$ LISTEN_FDS=$0 exec "$@"' $n \
      "$NBDSERVE" "$DISK" >"$T/out" 2>>"$T/err"
    assertEquals "$n sockets" 1 $?
    says LISTEN_FDS
  done
  timeout 20 sh -c 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&-' - \
    "$NBDSERVE" "$DISK" >"$T/out" 2>>"$T/err"
  assertEquals 'one that is closed' 1 $?
  says 'LISTEN_FDS: 1: 3 is not open$'
}
totals() { # clients
  assertEquals "totals: $(cat "$T/err")" 1 "$(grep -Ecx "\{\"clients\":$1\
(,\"[a-z_]+\":[0-9]+){6}${2-}\}" "$T/err")"
  : >"$T/err"
}
testStatsAreWrittenAtExitAndOnUSR1() {
  took='\{"requests":[0-9]+,"mean_us":[0-9]+,"max_us":[0-9]+\}'
  serve --stats "$DISK"
  client hello "$SOCK"
  kill -USR1 "$PID"
  await "[ -s '$T/err' ]"
  totals 3 "(,\"(read|flush|status)\":$took){3}"
  stop TERM
  totals 3 "(,\"(read|flush|status)\":$took){3}"
}
testStatsSayHowLongRequestsTook() {
  needs qemu-io python3 || return 0
  "$NBDSERVE" --stats --delay write:40 --fault write:EIO:0.5 mem:1M -- \
    qemu-io -f raw -c 'write 0 4k' -c 'write 0 4k' -c 'write 0 4k' \
    -c 'read 0 1M' '{}' >"$T/out" 2>&1
  assertEquals 'one write fails' 1 $?
  grep '^{' "$T/out" >"$T/stats"
  does python3 -c 'import json, sys
stats = json.load(open(sys.argv[1]))
assert stats["read"]["requests"] == 1 and stats["write"]["requests"] == 2
assert 40000 <= stats["write"]["mean_us"] <= stats["write"]["max_us"]
assert stats["write"]["max_us"] < 5e6 and stats["errors"] == 1
assert stats["read"]["max_us"] < 5e6, stats' "$T/stats"
}
testLogLinesHaveATimeWhereNobodyLooksOn() {
  serve -v "$DISK"
  client hello "$SOCK"
  stop TERM
  year=$(date -u +%Y)
  assertEquals "$(cat "$T/err")" 0 "$(grep -Ecv "^nbdserve: $year-[0-9-]{5}T\
[0-9:]{8}Z client" "$T/err")"
  assertTrue 'there are lines' "[ -s '$T/err' ]"
  : >"$T/err"
  JOURNAL_STREAM=8:1 serve -v "$DISK"
  client hello "$SOCK"
  stop TERM
  says '^nbdserve: client 1: connected'
}
testTraceMarksErrorsThatAreInjected() {
  needs qemu-io || return 0
  "$NBDSERVE" -vv --fault write:EIO:0.5 mem:1M -- \
    qemu-io -f raw -c 'write 0 4k' -c 'write 8k 4k' '{}' >"$T/out" 2>"$T/err"
  says 'NBD_CMD_WRITE off=8192 len=4096: --fault makes it fail'
}
testUSR1WritesStatsWithoutTheOption() {
  serve "$DISK"
  kill -USR1 "$PID"
  await "[ -s '$T/err' ]"
  totals 0
}
testSeveralTargetsAreSeveralExports() {
  echo two >"$T/b"
  serve "$DISK" two="$T/b" x=mem:1K
  client hello "$SOCK" disk
  assertEquals 65536 "$(cat "$T/log")"
  client hello "$SOCK" ''
  assertEquals 65536 "$(cat "$T/log")"
  client hello "$SOCK" two
  assertEquals 4 "$(cat "$T/log")"
  client hello "$SOCK" x
  assertEquals 1024 "$(cat "$T/log")"
  assertFalse 'no such export' "'$W/client' hello '$SOCK' none 2>/dev/null"
}
testTargetWithAnEqualsSignIsReachedByItsPath() {
  cp "$DISK" "$T/x=y"
  (cd "$T" && timeout 20 "$NBDSERVE" -s ./x=y <"$W/abort") >"$T/out"
  assertEquals 0 $?
}
testFilesComeOutOfAStoreAsTheyWentIn() {
  store || return 0
  noise 100000 >"$T/odd"
  noise 1 >"$T/one"
  : >"$T/empty"
  noise 300000 >"$T/holes"
  truncate -s 3000001 "$T/holes"
  noise 5000 | dd of="$T/holes" bs=1 seek=2000000 conv=notrunc 2>/dev/null
  for name in odd one empty holes; do
    cas 0 import "$S::$name" "$T/$name"
    same $name "$T/$name"
    cas 0 export "$S::$name" -
    assertTrue "$name to stdout" "cmp '$T/$name' '$T/out'"
    "$NBDSERVE" export "$S::$name" - 2>>"$T/err" | cat >"$T/out"
    assertTrue "$name to a pipe" "cmp '$T/$name' '$T/out'"
  done
  noise 9999 >"$T/same"
  cas 0 export "$S::one" "$T/same"
  assertTrue 'a longer file is replaced' "cmp '$T/one' '$T/same'"
  cas 0 verify "$S"
  assertEquals '' "$(cat "$T/out")"
}
testExportKeepsHoles() {
  store || return 0
  truncate -s 64M "$T/holes"
  noise 4096 | dd of="$T/holes" bs=4096 seek=5000 conv=notrunc 2>/dev/null
  cas 0 import "$S::v" "$T/holes"
  cas 0 export "$S::v" "$T/out"
  assertTrue "cmp '$T/holes' '$T/out'"
  assertTrue 'sparse' "[ $(du -k "$T/out" | cut -f1) -lt 1000 ]"
  stored
  assertTrue "stored: $GOT" "[ $GOT -lt 100000 ]"
}
# What has no size before its end can be imported, too; what has no end cannot.
testImportReadsPipes() {
  store || return 0
  mkfifo "$T/fifo"
  for size in 0 1 1048576 3000001; do
    noise $size >"$T/in"
    for how in alone served; do
      [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
      cat "$T/in" >"$T/fifo" &
      cas 0 import "$S::a" "$T/fifo"
      "$NBDSERVE" import "$S::b" - <"$T/in"
      assertEquals "import of $size bytes, $how" 0 $?
      same a "$T/in"
      same b "$T/in"
      cas 0 rm "$S::a" b
      [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || stop TERM
    done
  done
  for file in /dev/zero "$T"; do
    cas 1 import "$S::c" "$file"
    says "$file: neither a file nor a block device nor a pipe"
    "$NBDSERVE" import "$S::c" - <"$file" 2>"$T/err"
    assertEquals "- <$file" 1 $?
    says '-: neither a file nor a block device nor a pipe'
  done
  names
  assertEquals '' "$GOT"
}
testExportThatCannotFitSaysSoAtOnce() {
  needs root mount mkfs.ext3 && store && cas 0 create "$S::v" 1P || return 0
  mkdir "$T/m"
  truncate -s 8M "$T/image"
  mkfs.ext3 -q "$T/image" >/dev/null
  if ! mount -o loop "$T/image" "$T/m" 2>/dev/null; then
    skip 'nothing may be mounted'
    return 0
  fi
  cas 1 export "$S::v" "$T/m/out" # more than a file of ext3 can have
  says 'export v .*: File too large'
  assertEquals 'half a file' lost+found "$(ls -A "$T/m")"
  umount -l "$T/m"
}
# A store served as a raw disk would be destroyed by the first client.
testStoreIsNotServedAsAFileByMistake() {
  store && cas 0 create "$S::v" 1M || return 0
  for options in '' -r -T; do
    # shellcheck disable=SC2086
    run $options "$S"
    assertEquals "status, $options" 2 $STATUS
    says "$S: a store; serve $S:: or file:$S"
  done
  run -r "$S" "$S::v"
  says 'a store; '
  cp "$S" "$T/torn" # a superblock that is damaged does not hide the store
  dd if=/dev/zero of="$T/torn" bs=4096 count=1 conv=notrunc status=none
  run -r "$T/torn"
  assertEquals 'status, torn' 2 $STATUS
  says "$T/torn: a store; "
  run -s "file:$S"
  assertEquals 'status of file:' 0 $STATUS
  names
  assertEquals 'v ' "$GOT"
}
testStoreMayStandBeforeEachName() {
  store && cas 0 create "$S::v" 1M || return 0
  cas 0 snapshot "$S::v@a" "$S::v@b"
  cas 0 clone "$S::v@a" "$S::w" x
  cas 0 rename "$S::x" "$S::y"
  cas 0 diff "$S::v" "$S::w"
  cas 0 rm "$S::v@a" "$S::y"
  names
  assertEquals 'v v@b w ' "$GOT"
  : >"$T/other"
  for command in "clone $S::v $T/other::z" "rm $S::w $T/other::v"; do
    # shellcheck disable=SC2086
    cas 2 $command
    says "$T/other::[vz]: in another store than $S"
  done
  names
  assertEquals 'v v@b w ' "$GOT"
  ln -s "$S" "$T/link"
  cas 0 create "$S::x::y" 1M
  cas 0 rm "$S::w" x::y "$T/link::v@b"
  names
  assertEquals 'v ' "$GOT"
  cas 2 rm foo "$S::v" # and no $NBDSERVE_STORE
  says 'usage: nbdserve rm STORE::NAME'
}
testOptionsThatACommandDoesNotTakeAreRefused() {
  store && cas 0 create "$S::v" 1M || return 0
  for command in "-T rm $S::v" "-r snapshot $S::v@s" "--size 1M list $S" \
    "-p 5 list $S" "--accept-loss verify $S" "-n list $S" "-1 stat $S"; do
    # shellcheck disable=SC2086
    cas 2 $command
    says '--[a-z-]*: not for the command [a-z]*$'
  done
  cas 0 -q --json --no-verify --stall 5 list "$S"
  names
  assertEquals 'v ' "$GOT"
}
testMessagesAndStatusOfCommandsSayWhatIsWrong() {
  store && cas 0 create "$S::v" 1M && cas 0 snapshot "$S::v@s" || return 0
  while read -r command; do
    echo "$command" >"$T/line"
    read -r words <"$T/line"
    # shellcheck disable=SC2086
    cas ${words%% |*}
    says "^nbdserve: .*: ${words##*| }\$"
  done <<END
2 rollback $S::v | not a snapshot: that is VOLUME@NAME
2 seal $S::v | not a snapshot: that is VOLUME@NAME
2 resize $S::v@s 1M | a snapshot keeps its size
2 snapshot $S::v | a snapshot is called VOLUME@NAME
2 rename $S::v@s x | a snapshot is called VOLUME@NAME
2 rename $S::v v@t | a name with @ is a snapshot.s, of that volume
2 create $S::v@t 1M | a name with @ is a snapshot.s, of that volume
2 create $S::a/b 1M | not a name: 1 to 166 bytes without / @ .*
2 clone $S::v sha256-x | not a name: 1 to 166 bytes .* not sha256-...
2 create $S::x 7E | too large, or it cannot be combined with the others
2 mem:abc | not a size behind mem: .as in mem:1G.
1 create $S::v 1M | that name is taken
1 rm $S::x | no such volume or snapshot .list names all.
1 rm $S::v | it has snapshots; remove them first
1 rm $S::v@s v@s | no such volume or snapshot .list names all.
1 rollback $S::v@x | no such volume or snapshot .list names all.
END
  run "$S::x"
  says "$S::x: no such volume or snapshot .*list $S"
}
testErrorsAreJsonIfOutputIs() {
  store && needs python3 || return 0
  for name in x 'a"b' 'a\b' "$(printf 'a\tb')" "$(printf '\303\274\377\303')" \
    "$(printf '%2000s\303\274' x | tr ' ' '"')"; do
    cas 1 --json rm "$S::$name"
    does python3 -c 'import json, sys
name = sys.argv[1].replace("\t", "?").replace("\udcff\udcc3", "??")[:999]
text = json.loads(sys.stdin.read())["error"]
assert text == "rm %s: no such volume or snapshot (list names all)" % name' \
      "$name" <"$T/err"
    : >"$T/err"
  done
  cas 2 --json rm
  says '^\{"error":"usage: nbdserve rm '
  unless NO_THREADS || return 0
  serve "$S::"
  cas 1 --json rm "$S::x"
  says '^\{"error":"rm x: no such volume'
}
testHelpOfACommandSaysWhatItTakes() {
  store || return 0
  cas 0 help rm
  assertContains "$(cat "$T/out")" 'rm STORE::NAME [NAME...]'
  assertContains "$(cat "$T/out")" 'remove volumes and snapshots'
  assertContains "$(cat "$T/out")" '--dry-run'
  cas 0 help repair
  assertContains "$(cat "$T/out")" '--accept-loss'
  assertNotContains "$(cat "$T/out")" '--dry-run'
  cas 2 help nothing
  says 'help nothing: no such command'
  cas 0 help rm
  cp "$T/out" "$T/help"
  for words in 'rm --help' '--help rm' 'rm -h a b'; do
    # shellcheck disable=SC2086
    cas 0 $words
    assertEquals "$words" '' "$(diff "$T/help" "$T/out")"
  done
}
testASecondServerIsToldWhereTheFirstOneIs() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1M
  cas 1 uri "$S"
  says '^nbdserve: uri .*: it is not served'
  serve "$S::"
  cas 0 uri "$S"
  assertEquals "nbd+unix:///v?socket=$SOCK	$PID" "$(cat "$T/out")"
  cas 0 --json uri "$S"
  assertEquals "{\"uri\":\"nbd+unix:///v?socket=$SOCK\",\"process\":$PID}" \
    "$(cat "$T/out")"
  run "$S::v"
  assertEquals 'in use' 4 "$STATUS"
  assertEquals "nbd+unix:///v?socket=$SOCK	$PID" "$(sed -n 2p "$T/err")"
  sed -i 2d "$T/err"
  says 'in use by a server; stop or use it.  URI, process id:'
}
testRmOfSeveralTakesThemInAnyOrderAndADryRunKnows() {
  store && cas 0 create "$S::a" 1M && cas 0 create "$S::b" 1M || return 0
  cas 0 snapshot "$S::a@1" a@2 b@1
  for names in 'a@1 a@2 a' 'a a@2 a@1'; do
    # shellcheck disable=SC2086
    cas 0 -n rm "$S::"$names
    names
    assertEquals 'a a@1 a@2 b b@1 ' "$GOT"
  done
  for names in 'a a@1' 'a@1 a@2 a b'; do
    for dry in -n ''; do
      # shellcheck disable=SC2086
      cas 1 $dry rm "$S::"$names
      says "rm [ab]: it has snapshots; remove them first"
    done
  done
  for dry in -n ''; do
    # shellcheck disable=SC2086
    cas 1 $dry rm "$S::a@1" a@1
    says 'rm a@1: no such volume'
  done
  names
  assertEquals 'a a@1 a@2 b b@1 ' "$GOT"
  cas 0 rm "$S::a" a@2 a@1
  names
  assertEquals 'b b@1 ' "$GOT"
}
testAnIdOfSeveralSnapshotsRemovesNone() {
  store && cas 0 create "$S::a" 1M || return 0
  cas 0 snapshot "$S::a@1" a@2
  cas 0 seal "$S::a@1"
  id=$(cat "$T/out")
  cas 0 seal "$S::a@2"
  for command in "rm $S::$id" "rollback $S::$id" "-n rollback $S::$id" \
    "rename $S::$id a@3"; do
    # shellcheck disable=SC2086
    cas 1 $command
    says 'several snapshots have that id'
  done
  cas 0 rm "$S::a@1"
  cas 0 rm "$S::$id"
  names
  assertEquals 'a ' "$GOT"
}
testExportReplacesNoStore() {
  store && cas 0 create "$S::a" 1M || return 0
  cas 0 init "$T/other"
  cas 0 create "$T/other::v" 1M
  for file in "$T/other" "$S"; do
    run export "$S::a" "$file"
    assertNotEquals "$file" 0 "$STATUS"
    says ': a store; remove it first|in use'
  done
  run list "$T/other"
  assertEquals v "$(cut -f1 "$T/out")"
  names
  assertEquals 'a ' "$GOT"
}
testImportDoesNotReadItsOwnStore() {
  store && cas 0 create "$S::a" 1M || return 0
  ln -s "$S" "$T/link"
  cas 2 import "$S::b" "$T/link"
  says 'link: the store itself'
  names
  assertEquals 'a ' "$GOT"
}
testImportOfWhatIsBeingWrittenIsRefused() {
  store || return 0
  serve "$DISK"
  cas 4 import "$S::v" "$DISK"
  says "$DISK: in use by a server"
  stop TERM
  serve -r "$DISK" # readers do not disturb each other
  cas 0 import "$S::v" "$DISK"
  stop TERM
  exec 9<"$DISK"
  cas 0 import "$S::w" - <&9 # leaves no lock on what is the caller's
  run "$DISK" -- true
  exec 9<&-
  assertEquals 0 "$STATUS"
}
testTargetsWithoutANameAreRefused() {
  run -s ''
  assertEquals 2 "$STATUS"
  says 'a target without a name'
  store || return 0
  for option in '-e x' '-D x'; do
    # shellcheck disable=SC2086
    run -s $option "$S::"
    assertEquals "$option" 2 "$STATUS"
    says 'no name or description for all of its volumes'
  done
}
testNewNamesAreInNoOtherStore() {
  store && cas 0 create "$S::a" 1M || return 0
  for command in "clone $S::a $T/none::b" "rename $S::a none::b"; do
    # shellcheck disable=SC2086
    cas 2 $command
    says 'none::b: no such store'
  done
  cas 0 init "$T/other"
  cas 2 clone "$S::a" "$T/other::b"
  says 'other::b: in another store'
  for command in export import; do # they name a FILE, and that is none
    cas 2 $command "$S::$command" "$T/other::b"
    says 'other::b: a volume, and not a FILE'
    assertFalse "$command" "[ -e '$T/other::b' ]"
  done
  names
  assertEquals 'a ' "$GOT"
}
testCommandsOnNoStoreSayHowToMakeOne() {
  store || return 0
  for command in list verify gc stat repair; do
    cas 1 $command "$T/none"
    says "$T/none: no such store .*init"
  done
}
testServingTakesNoOptionsOfCommands() {
  for option in -n --accept-loss; do
    run $option --create 1M "$T/new"
    assertEquals "$option" 2 "$STATUS"
    says 'only for commands on stores'
  done
  assertFalse 'nothing was made' "[ -e '$T/new' ]"
}
testDryRunChangesNothing() {
  store || return 0
  noise 10000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@s"
  cas 0 create "$S::w" 64K
  listed
  before=$GOT
  for command in "create $S::n 5" "snapshot $S::v@t" "rollback $S::v@s" \
    "clone $S::v c" "rename $S::v n" "resize $S::v 5" "rm $S::w"; do
    case $command in
      ro* | res* | rm*) expected=0 ;;
      *) expected=2 ;; # not offered
    esac
    # shellcheck disable=SC2086
    cas $expected -n $command
    [ "$expected" != 0 ] ||
      assertEquals "${command%% *}: possible; nothing was changed" \
        "$(cat "$T/out")"
    [ "$expected" = 0 ] || says "dry-run: not for the command ${command%% *}"
    listed
    assertEquals "-n $command" "$before" "$GOT"
  done
  same v "$T/in"
  cas 1 --dry-run rm "$S::x"
  says 'no such volume or snapshot'
  cas 1 -n rm "$S::v"
  says 'rm v.*: '
  cas 2 -n import "$S::new" "$T/in"
  says 'dry-run: not for the command import'
}
testExportToStandardOutputNeverTruncates() {
  store || return 0
  noise 100000 >"$T/a"
  noise 200000 >"$T/b"
  cas 0 import "$S::a" "$T/a"
  cas 0 import "$S::b" "$T/b"
  "$NBDSERVE" export "$S::a" - >"$T/both"
  "$NBDSERVE" export "$S::b" - >>"$T/both"
  cat "$T/a" "$T/b" >"$T/wanted"
  assertTrue 'one behind the other' "cmp '$T/wanted' '$T/both'"
}
testExportDoesNotOverwriteAStore() {
  store || return 0
  cas 0 create "$S::v" 1M
  cas 1 export "$S::v" "$S"
  says 'a store; remove it first'
  cas 0 verify "$S"
}
testSlicesOfVolumesAreRefused() {
  store || return 0
  cas 0 create "$S::v" 1M
  for option in '-o 512K' '--size 4K' '--create 1M'; do
    # shellcheck disable=SC2086
    cas 2 $option "$S::v" -- true
    says 'no --offset'
  done
}
testWrongStoreCommandsExit2() {
  store || return 0
  for command in "create $S::v" "create $S 5" create "list $S x" list \
    "rm $S" snapshot rollback "clone $S::v" \
    "rename $S::v" "resize $S::v" "resize $S::v x" "import $S::v" \
    "export $S::v" "create $S::v 1x" "create $S::v -1" "verify" "stat" \
    "init" "init $T/x 5000" "init $T/x 512" "init $T/x 128K" "init $T/x x"; do
    # shellcheck disable=SC2086
    cas 2 $command
    says '[a-z]'
  done
  names
  assertEquals '' "$GOT"
}
testChangesOffersTheContextOfOneSnapshotOnly() {
  store || return 0
  cas 0 create "$S::v" 1M
  cas 0 create "$S::w" 1M
  cas 0 snapshot "$S::v@a" v@b
  DISK=$S::v
  ask='structured=ack'
  haggle "$ask listmeta=qemu:dirty-bitmap:a? listmeta=qemu:dirty-bitmap:b?
    listmeta=ack" "$(opt STRUCTURED)" "$(meta LIST_META '' qemu:)"
  ARGS='--changes b'
  haggle "$ask listmeta=qemu:dirty-bitmap:b? listmeta=ack" \
    "$(opt STRUCTURED)" "$(meta LIST_META '' qemu:)"
  DISK=$S:: # of a whole store, where there is such a snapshot
  for name in v:qemu:dirty-bitmap:b v@a:qemu:dirty-bitmap:b w: v@b:; do
    expected=${name#*:}
    haggle "$ask ${expected:+listmeta=$expected?} listmeta=ack" \
      "$(opt STRUCTURED)" "$(meta LIST_META "$(of "${name%%:*}")" qemu:)"
  done
  ARGS=
  for target in "$S::v@b" "$S::w"; do
    cas 1 -s --changes b "$target"
    says 'changes b: no other snapshot'
  done
  cas 2 -s --changes b mem:1M
  says 'mem:1M: --changes is for volumes'
  cas 2 --changes b list "$S"
  says 'changes: not for the command list'
}
testSealAndDiffAreCommands() {
  store || return 0
  noise 100000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@s"
  cas 0 seal "$S::v@s"
  assertTrue "id: $(cat "$T/out")" "grep -Eqx 'sha256-[0-9a-f]{64}' '$T/out'"
  cas 2 seal "$S::v"
  says 'seal v: not a snapshot: '
  DISK=$S::v SIZE=100000
  simple OK.1 WRITE,1,5000,4 61626364
  cas 0 diff "$S::v@s" v
  assertTrue "rows: $(cat "$T/out")" "[ -s '$T/out' ]"
  assertEquals 'OFFSET LENGTH' '' "$(grep -Evx '[0-9]+	[0-9]+' "$T/out")"
  for words in 'diff v x' 'diff x v' 'diff x y' 'diff v@s x' 'clone x y' \
    'rename x y'; do
    # shellcheck disable=SC2086
    set -- $words
    cas 1 "$1" "$S::$2" "$3"
    says "^nbdserve: $1 x: no such volume"
  done
  for command in "seal $S" "seal $S::v@s x" "diff $S::v" "diff $S::v v v" \
    "-n seal $S::v@s"; do
    # shellcheck disable=SC2086
    cas 2 $command
    says 'usage: nbdserve (seal|diff) |dry-run: not for'
  done
  listed
  assertEquals 'columns' 5 "$(echo "$GOT" | awk -F'\t' '{print NF}' | sort -u)"
}
testWhatCommandsWriteIsSynced() { fault export "$DISK"; }
testImportOverAnExistingNameSaysSo() {
  store || return 0
  noise 1000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  noise 2000 >"$T/other"
  cas 1 import "$S::v" "$T/other"
  says '^nbdserve: import v: that name is taken$'
  same v "$T/in"
}
testOutputThatIsLostIsAFailure() {
  store || return 0
  needs /dev/full || return 0
  cas 0 create "$S::v" 1M
  for command in "list $S" "stat $S" "--json stat $S" "export $S::v -"; do
    # shellcheck disable=SC2086
    "$NBDSERVE" $command >/dev/full 2>>"$T/err"
    assertEquals "$command" 1 $?
    says 'No space left'
  done
}
# Runs a command with --json: GOT, a Python expression of what it printed, x
parsed() { # status expression command...
  expected=$1 expression=$2
  shift 2
  cas "$expected" --json "$@"
  GOT=$(python3 -c 'import json, sys
x = json.load(sys.stdin)
print(eval(sys.argv[1]))' "$expression" <"$T/out" 2>&1)
}
testStoreCommandsPrintJsonThatParses() {
  needs python3 && store || return 0
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    parsed 0 x list "$S"
    [ $how = served ] || assertEquals 'an empty store' '[]' "$GOT"
    cas 0 create "$S::$how" 100000
    cas 0 snapshot "$S::$how@s"
    parsed 0 "sorted((i['name'], i['size'], len(i['created']), i['id'])
      for i in x if i['name'].startswith('$how'))" list "$S"
    assertEquals $how "[('$how', 100000, 20, ''), ('$how@s', 100000, 20, '')]" \
      "$GOT"
    parsed 0 "' '.join(x), x['block_size'], x['log'] < 100" stat "$S"
    assertEquals $how "('block_size stored free file log', 4096, True)" "$GOT"
    parsed 0 'x' verify "$S"
    assertEquals $how '[]' "$GOT"
    if [ "$SWITCH" != POSIX_ONLY ]; then
      parsed 0 "list(x), x['bytes'] >= 0" gc "$S"
      assertEquals $how "(['bytes'], True)" "$GOT"
    fi
    parsed 0 "list(x), len(x['id'])" seal "$S::$how@s"
    assertEquals $how "(['id'], 71)" "$GOT"
    cas 0 create "$S::more$how" 200000
    parsed 0 "[list(i) for i in x] in ([], [['offset', 'length']])" \
      diff "$S::$how" more$how
    assertEquals $how True "$GOT"
  done
}
testDamageIsReportedAsJson() {
  needs python3 && damageable || return 0
  flip $(($(slot "$DATA") + 100))
  flip $(($(slot "$DATA") + 4 * 4096))
  parsed 3 "[(i['name'], i['offset'], i['length'], i['why'][:8]) for i in x]" \
    verify "$S"
  assertEquals "[('v', 81920, 4096, 'the data'), ('v', 98304, 4096, \
'the data')]" "$GOT"
}
# A reader that pauses for more than a second makes an export long work.  Those
# without a server wait at the same time, each with a store of its own.
exports_slowly() { # way: STORE-PAUSE or STORE-piped
  command="'$NBDSERVE' export '$T/$1::v' -"
  case $1 in
    *piped) sh -c "$command" 2>"$T/tty-$1" |
      { sleep 1.3; cat >"$T/copy-$1"; } ;;
    *) script -qec "$command | { sleep ${1#*-}; cat >'$T/copy-$1'; }" \
      /dev/null </dev/null >"$T/tty-$1" ;;
  esac
}
testProgressIsShownOnATerminal() {
  needs script terminal && store || return 0
  noise 2000000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  alone='alone-0 alone-1.5 alone-piped' served=
  for way in $alone; do cp "$S" "$T/$way"; done
  if [ "$SWITCH" != NO_THREADS ]; then # a server does one after the other
    serve "$S::"
    served='served-0 served-1.5 served-piped'
    for way in $served; do
      ln -s "$S" "$T/$way"
      ln -s "$S.ctl" "$T/$way.ctl"
    done
  fi
  pids=
  for way in $alone; do
    exports_slowly "$way" &
    pids="$pids $!"
  done
  for way in $served; do exports_slowly "$way"; done
  # shellcheck disable=SC2086
  wait $pids
  ways="$alone $served"
  for way in $ways; do
    assertTrue "$way" "cmp '$T/in' '$T/copy-$way'"
    case $way in
      *1.5)
        assertTrue "$way: $(cat "$T/tty-$way")" "tr '\r' '\n' <'$T/tty-$way' |
          grep -Eq '^ *[0-9]+%$'"
        assertEquals "$way: nothing stays" '' "$(tr '\r' '\n' <"$T/tty-$way" |
          tail -n 1 | tr -d ' ')"
        ;;
      *) assertEquals "$way" '' "$(cat "$T/tty-$way")" ;;
    esac
  done
}
testTheEnvironmentNamesTheStore() {
  store || return 0
  noise 1000 >"$T/in"
  NBDSERVE_STORE=$S
  export NBDSERVE_STORE
  cas 0 import v "$T/in"
  cas 0 snapshot v@s
  cas 0 list
  assertEquals 'v v@s ' "$(cut -f1 "$T/out" | sort | tr '\n' ' ')"
  cas 0 export v@s "$T/out2"
  assertTrue "cmp '$T/in' '$T/out2'"
  cas 0 verify
  cas 0 stat
  NBDSERVE_STORE=$S::
  cas 0 create w 1M
  NBDSERVE_STORE=
  cas 2 create x 1M
  says 'usage: nbdserve create'
  unset NBDSERVE_STORE
}
testInitTakesASizeWhereTheEnvironmentNamesTheStore() {
  store || return 0
  NBDSERVE_STORE=$T/env
  export NBDSERVE_STORE
  cd "$T" || return
  cas 0 init 64K
  cas 2 init 5000
  says 'block size'
  cas 0 init other
  cas 0 init ./8K
  rm "$T/env"
  cas 0 init
  unset NBDSERVE_STORE
  cas 0 init 16K
  cas 0 init double::8K
  NBDSERVE_STORE=$T/large "$NBDSERVE" init 64K
  assertFalse 'no file of that name' "[ -e '$T/64K' ]"
  cd "$here" || return
  for size in env:4096 other:4096 8K:4096 16K:4096 double:8192; do
    cas 0 stat "$T/${size%:*}"
    assertEquals "$size" "block_size	${size#*:}" "$(head -n 1 "$T/out")"
  done
  cas 0 stat "$T/large"
  assertEquals 'block_size	65536' "$(head -n 1 "$T/out")"
}
testCommandsOnAServedStoreAreDoneByTheServer() {
  store && unless NO_THREADS || return 0
  noise 300000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 create "$S::w" 1M
  serve "$S::"
  assertEquals 600 "$(stat -c %a "$S.ctl")"
  names
  assertEquals 'v w ' "$GOT"
  cas 0 snapshot "$S::v@s"
  cas 0 import "$S::n" "$T/in"
  same n "$T/in"
  same v@s "$T/in"
  cas 0 export "$S::v" -
  assertTrue 'to stdout' "cmp '$T/in' '$T/out'"
  cas 0 verify "$S"
  cas 0 resize "$S::w" 2M
  cas 1 create "$S::v" 5
  says 'create v.*: that name is taken'
  cas 0 -n rm "$S::n"
  cas 0 rm "$S::n" v@s
  names
  assertEquals 'v w ' "$GOT"
  stop TERM
  assertEquals "status: $(cat "$T/err")" 0 $STATUS
  assertFalse 'the socket is gone' "[ -e '$S.ctl' ]"
  names
  assertEquals 'v w ' "$GOT"
}
testLongListsOfNamesReachTheServerWhole() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1M
  n=$(seq -f "$(printf %0150d 0)-%g" 300) # 46 KB
  serve "$S::"
  # shellcheck disable=SC2086
  cas 0 clone "$S::v" $n
  names
  assertEquals "$(echo v "$n" | tr ' ' '\n' | sort | tr '\n' ' ')" "$GOT"
}
# 512 MiB of data, which take a while, in $W/much
much() { [ -e "$W/much" ] || yes | head -c 512M >"$W/much"; }
# Waits for a command in the background: STATUS, within 10 s
finishes() { # signal, seconds until then, or until it catches TERM
  PID=$!
  sleep "${2-0.5}"
  [ ! -e /proc/self/status ] ||
    await "grep -q '^SigCgt:.*[4-7c-f]...\$' /proc/$PID/status"
  kill -"$1" "$PID"
  await "! kill -0 $PID 2>/dev/null"
  wait "$PID"
  STATUS=$?
}
# A store that takes a while to verify or to seal: v, v@s, with half a gigabyte,
# no two blocks of it alike, made once
slow_store() {
  store || return 1
  if [ ! -e "$W/slow" ]; then
    cas 0 init "$W/slow"
    build client || return 1
    "$W/client" noise "$SEED" 1 512000000 >"$T/noise"
    cas 0 import "$W/slow::v" "$T/noise"
    rm "$T/noise"
    cas 0 snapshot "$W/slow::v@s"
  fi
  S=$W/slow
}
testTERMEndsACommandAndLeavesNothingHalf() {
  unhurried || return 0
  store || return 0
  much
  "$NBDSERVE" import "$S::n" "$W/much" 2>>"$T/err" &
  finishes TERM 0.1
  assertEquals import 1 $STATUS
  says 'import n: .*ancel'
  names
  assertEquals '' "$GOT"
  rm "$S"
  slow_store || return 0
  "$NBDSERVE" verify "$S" 2>>"$T/err" &
  finishes TERM 0.1
  assertEquals verify 1 $STATUS
  says 'verify .*: .*ancel'
  "$NBDSERVE" seal "$S::v@s" 2>>"$T/err" &
  finishes TERM 0.1
  assertEquals seal 1 $STATUS
  says 'seal v@s: .*ancel'
  listed
  assertNotContains 'it has no id' "$GOT" sha256
}
testTERMOfTheServerEndsItsCommandsToo() {
  slow_store && unless NO_THREADS || return 0
  much
  for command in "verify $S" "import $S::n $W/much" "seal $S::v@s"; do
    serve "$S::"
    # shellcheck disable=SC2086
    "$NBDSERVE" $command 2>>"$T/err" &
    COMMAND=$!
    sleep 0.1
    [ ! -e /proc/self/fd ] || # it is connected: else it waits for the end
      await "ls -l /proc/$COMMAND/fd | grep -q socket:"
    stop TERM
    assertEquals "the server: $(cat "$T/err")" 0 $STATUS
    wait $COMMAND
    assertEquals "$command" 1 $?
    says "${command%% *}.*: .*ancel"
    assertFalse 'the socket is gone' "[ -e '$S.ctl' ]"
    names
    assertEquals 'v v@s ' "$GOT"
  done
}
testCommandOfAClientThatIsGoneIsNotGoneOnWith() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1T
  serve "$S::"
  yes | "$NBDSERVE" import "$S::n" - 2>>"$T/err" &
  finishes KILL 0.3
  names
  assertEquals 'v ' "$GOT"
  # The name is free again soon, although the data never ends
  await "'$NBDSERVE' create '$S::n' 1M 2>/dev/null"
  : >"$T/err"
  JOB=${JOBS# } PID=${JOBS#*:} JOB=${JOB%:*}
}
testWhatIsSentToTheControlSocketIsNotKept() {
  needs python3 /proc/self/fd && store && unless NO_THREADS || return 0
  serve "$S::"
  before=$(find "/proc/$PID/fd" -type l | wc -l)
  python3 - "$S.ctl" <<'END'
import array, socket, sys
for n in range(9):
    for data in b"x", b"x" * 20000, b"\0" * 20000: # zeroes: the first verb
        s = socket.socket(socket.AF_UNIX)
        s.connect(sys.argv[1])
        fds = array.array("i", [0] * n)
        s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                  if n else [])
        s.close()
END
  names
  after=$(find "/proc/$PID/fd" -type l | wc -l)
  assertEquals 'open files' "$before" "$after"
}
testControlSocketOutlivesTheLackOfDescriptors() {
  needs python3 && store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1M
  printf '#!/bin/sh\nulimit -n 40\nexec "%s" "$@"\n' "$NBDSERVE" >"$T/few"
  chmod +x "$T/few"
  was=$NBDSERVE NBDSERVE=$T/few LOG='^nbdserve: '
  serve "$S::"
  NBDSERVE=$was
  python3 -c 'import socket, sys, time
s = [socket.socket(socket.AF_UNIX) for i in range(60)]
for i in s: i.connect(sys.argv[1])
open(sys.argv[2], "w")
time.sleep(2)' "$SOCK" "$T/full" &
  await "[ -e '$T/full' ]"
  sleep 0.5 # one that comes when too few have become free gets no answer
  await "'$NBDSERVE' list '$S' >'$T/out' 2>>'$T/err'"
  assertEquals v "$(cut -f1 "$T/out")"
  wait $!
}

# ---- Commands beside each other ----

# Milliseconds that a command takes, which must succeed: MS
timed() {
  from=$(clock)
  cas 0 "$@"
  MS=$(($(clock) - from))
}
testACommandWaitsForNoOther() {
  needs python3 && store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1T
  cas 0 create "$S::w" 1M
  serve "$S::"
  python3 - "$S.ctl" "$T/silent" <<'END' & # who says nothing
import socket, sys, time
c = [socket.socket(socket.AF_UNIX) for i in range(20)]
for s in c: s.connect(sys.argv[1])
from_ = time.time()
open(sys.argv[2], "w").close()
for s in c:
    s.settimeout(20)
    assert s.recv(1) == b""
with open(sys.argv[2], "w") as f: f.write("%d" % (time.time() - from_))
END
  silent=$!
  mkfifo "$T/pipe"
  exec 9<>"$T/pipe"
  "$NBDSERVE" export "$S::v" - >&9 2>/dev/null & # who reads nothing
  "$NBDSERVE" verify "$S" 2>/dev/null & # what takes long
  await "[ -e '$T/silent' ]"
  sleep 0.3
  timed snapshot "$S::w@s"
  assertTrue "snapshot: $MS ms" "[ $MS -lt 1000 ]"
  timed list "$S"
  assertTrue "list: $MS ms" "[ $MS -lt 1000 ]"
  wait $silent
  assertTrue "silent for $(cat "$T/silent") s" \
    "[ $(cat "$T/silent") -ge 4 ] && [ $(cat "$T/silent") -le 7 ]"
  from=$(clock)
  stop TERM
  MS=$(($(clock) - from))
  assertTrue "the end: $MS ms" "[ $MS -lt 2000 ]"
  cas 0 list "$S"
  exec 9>&-
}
testLongCommandsAtATimeAreLimited() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1T
  serve "$S::"
  mkfifo "$T/pipe"
  exec 9<>"$T/pipe"
  pids=
  # One more until there are 16: each list is one, too, and may forestall it
  while "$NBDSERVE" list "$S" >"$T/out" 2>"$T/err"; do
    "$NBDSERVE" export "$S::v" - >&9 2>/dev/null &
    pids="$pids $!"
    sleep 0.05
  done
  says '^nbdserve: list: the server is doing 16 others'
  assertEquals 'no rows' '' "$(cat "$T/out")"
  cas 1 export "$S::v" "$T/file"
  says 'export: the server is doing 16 others'
  assertFalse 'no file' "[ -e '$T/file' ]"
  cas 0 snapshot "$S::v@s"
  cas 0 stat "$S"
  # shellcheck disable=SC2086
  kill $pids 2>/dev/null # those that were one too many have ended
  # shellcheck disable=SC2086
  wait $pids 2>/dev/null
  await "'$NBDSERVE' list '$S' >'$T/out' 2>/dev/null"
  exec 9>&-
}
testOutputThatNobodyTakesEndsACommand() {
  store || return 0
  cas 0 create "$S::v" 1G
  mkfifo "$T/pipe"
  exec 9<>"$T/pipe"
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve --stall 1 "$S::"
    timeout 20 "$NBDSERVE" --stall 1 export "$S::v" - >&9 2>>"$T/err"
    assertEquals "$how" 1 $?
    says '^nbdserve: export v -: nobody takes its output$'
  done
  exec 9>&-
}
testMessageThatNobodyTakesIsDropped() {
  store && unless NO_THREADS || return 0
  serve "$S::"
  mkfifo "$T/pipe"
  exec 9<>"$T/pipe"
  head -c 65536 /dev/zero >&9 # it is full now
  from=$(clock)
  timeout 20 "$NBDSERVE" rm "$S::nix" 2>&9
  assertEquals 'status' 1 $?
  MS=$(($(clock) - from))
  assertTrue "$MS ms" "[ $MS -lt 3000 ]"
  exec 9>&-
}
testReaderThatHasGoneEndsACommand() {
  store || return 0
  cas 0 create "$S::v" 1G
  n=$(seq -f "$(printf %0150d 0)-%g" 600) # 90 KB
  # shellcheck disable=SC2086
  cas 0 clone "$S::v" $n
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    { "$NBDSERVE" list "$S" 2>>"$T/err"; echo $? >"$T/status"; } |
      { sleep 0.2; head -n 1 >"$T/out"; }
    assertEquals "$how: list" '1 1' "$(cat "$T/status") $(wc -l <"$T/out")"
    assertEquals "$how: list is silent" '' "$(cat "$T/err")"
    { "$NBDSERVE" export "$S::v" - 2>>"$T/err"; echo $? >"$T/status"; } |
      head -c 1 >"$T/out"
    assertEquals "$how: export" 1 "$(cat "$T/status")"
    says '^nbdserve: export v -: Broken pipe$'
  done
}
testSeveralSnapshotsAreOneCommand() {
  store || return 0
  cas 0 create "$S::v" 1M
  cas 0 create "$S::w" 1M
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    cas 0 snapshot "$S::v@$how" w@$how
  done
  names
  assertEquals 'v v@alone v@served w w@alone w@served ' "$GOT"
}
testSeveralChangesAreAllOrNone() {
  store || return 0
  for name in v w x; do cas 0 create "$S::$name" 1M; done
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    cas 1 rm "$S::v" w nix x
    says '^nbdserve: rm nix: no such volume'
    cas 1 clone "$S::v" a b w c
    says '^nbdserve: clone v w: that name is taken'
    cas 1 snapshot "$S::v@s" w@s nix@s
    says '^nbdserve: snapshot nix@s: no such volume'
    names
    assertEquals "$how" 'v w x ' "$GOT"
  done
}
files() { find "$1" -mindepth 1 -printf '%f\n' | sort | tr '\n' ' '; }
testExportLeavesNoHalfFile() {
  store || return 0
  was=$(umask)
  noise 300000 >"$T/in"
  truncate -s 300M "$T/in"
  cas 0 import "$S::v" "$T/in"
  mkdir "$T/to"
  echo old >"$T/to/old"
  chmod 604 "$T/to/old"
  ln -s old "$T/to/link"
  for how in alone served; do
    if [ $how = served ] && [ "$SWITCH" != NO_THREADS ]; then
      printf '#!/bin/sh\nulimit -f 100000\nexec "%s" "$@"\n' "$NBDSERVE" \
        >"$T/few"
      chmod +x "$T/few"
      alone=$NBDSERVE NBDSERVE=$T/few
      serve "$S::"
      NBDSERVE=$alone
    fi
    for file in old link new; do
      (ulimit -f 100000 && exec "$NBDSERVE" export "$S::v" "$T/to/$file") \
        2>>"$T/err"
      assertEquals "$how $file" 1 $?
      says "export v .*$file: File too large"
    done
    assertEquals "$how" 'link old ' "$(files "$T/to")"
    assertEquals "$how" old "$(cat "$T/to/old")"
  done
  [ "$SWITCH" = NO_THREADS ] || stop TERM
  umask 027
  cas 0 export "$S::v" "$T/to/new"
  cas 0 export "$S::v" "$T/to/link"
  umask "$was"
  assertEquals 'the old mode' 604 "$(stat -c %a "$T/to/old")"
  assertEquals 'a new mode' 640 "$(stat -c %a "$T/to/new")"
  assertTrue 'the link stays' "[ -L '$T/to/link' ]"
  assertTrue 'what it leads to' "cmp '$T/in' '$T/to/old'"
  assertTrue 'the new file' "cmp '$T/in' '$T/to/new'"
  assertEquals 'nothing else' 'link new old ' "$(files "$T/to")"
}
testTERMEndsAnExportAndLeavesNoHalfFile() {
  unhurried || return 0
  store || return 0
  yes | head -c 1536M | does "$NBDSERVE" import "$S::v" - # for a second or so
  mkdir "$T/to"
  echo old >"$T/to/old"
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    for file in old new; do
      "$NBDSERVE" export "$S::v" "$T/to/$file" 2>>"$T/err" &
      finishes TERM 0.1
      assertEquals "$how $file" 1 $STATUS
      says 'export.*: .*ancel'
    done
    assertEquals "$how" 'old old' "$(head -c 4 "$T/to/old") $(ls -A "$T/to")"
  done
  JOB=${JOBS# } PID=${JOBS#*:} JOB=${JOB%:*}
}
testExportWritesToWhatIsNoFile() {
  store || return 0
  noise 300000 >"$T/in"
  truncate -s 1M "$T/in"
  cas 0 import "$S::v" "$T/in"
  mkfifo "$T/fifo"
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    cat "$T/fifo" >"$T/copy" &
    cas 0 export "$S::v" "$T/fifo"
    wait $!
    assertTrue "$how: fifo" "[ -p '$T/fifo' ] && cmp '$T/in' '$T/copy'"
    cas 0 export "$S::v" /dev/null
    assertTrue "$how: device" '[ -c /dev/null ]'
  done
}
testHolesOfAFileTakeNoTime() {
  store && unless POSIX_ONLY || return 0
  truncate -s 1T "$T/holes"
  printf x | dd of="$T/holes" bs=1 seek=500G conv=notrunc 2>/dev/null
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    timed import "$S::$how" "$T/holes"
    assertTrue "$how: import: $MS ms" "[ $MS -lt 5000 ]"
    timed export "$S::$how" "$T/copy"
    assertTrue "$how: export: $MS ms" "[ $MS -lt 5000 ]"
    assertEquals "$how" 1099511627776 "$(stat -c %s "$T/copy")"
    assertEquals "$how" x \
      "$(dd if="$T/copy" bs=1 skip=500G count=1 2>/dev/null)"
    assertTrue "$how: sparse" "[ $(du -k "$T/copy" | cut -f1) -lt 1000 ]"
    rm "$T/copy"
  done
}
testStoreThatIsInUseForAMomentIsWaitedFor() {
  unhurried || return 0
  needs flock && store || return 0
  cas 0 create "$S::v" 1M
  flock "$S" sleep 0.7 &
  sleep 0.2
  cas 0 list "$S"
  flock "$S" sleep 0.7 &
  sleep 0.2
  serve "$S::v"
  stop TERM
  flock "$S" sleep 4 &
  holder=$!
  sleep 0.2
  cas 4 list "$S"
  says "$S: in use by one that takes no commands"
  wait $holder
}
testSymbolicLinksLeadToTheServerOfAStore() {
  store && unless NO_THREADS || return 0
  cas 0 create "$S::v" 1M
  mkdir "$T/there"
  ln -s ../store "$T/there/link"
  serve "$S::"
  cas 0 list "$T/there/link"
  stop TERM
  serve "$T/there/link::"
  assertTrue 'beside the store' "[ -S '$S.ctl' ]"
  cas 0 snapshot "$S::v@s"
  cas 0 snapshot "$T/there/link::v@t"
  names
  assertEquals 'v v@s v@t ' "$GOT"
}
testRepairIsACommand() {
  store || return 0
  cas 0 create "$S::v" 1M
  cas 0 repair "$S"
  assertEquals '' "$(cat "$T/out")"
  cas 0 --accept-loss repair "$S"
  cas 2 --accept-loss verify "$S"
  says 'accept-loss: not for the command verify'
  unless NO_THREADS || return 0
  serve "$S::"
  cas 0 repair "$S"
  cas 4 repair "$S" --accept-loss
  says "$S: is being served; stop the server first"
}
testRepairTellsWhatRemainsDamaged() {
  damageable || return 0
  flip $(($(slot "$DATA") + 100))
  for how in alone served; do
    [ $how = alone ] || [ "$SWITCH" = NO_THREADS ] || serve "$S::"
    cas 3 repair "$S"
    assertEquals "$how" 'v	81920	4096' "$(cut -f1-3 "$T/out")"
  done
}
# A command for --run that is connected: holder FILE says so in FILE, and waits
# for SIGTERM.  Then it writes "late" to offset 8 over its old connection, tries
# a new one, tells both in FILE, and ends with status 9.
holder() {
  needs python3 || return 1
  cat >"$T/holder.py" <<END
import os, signal, socket, sys, threading
greeting = bytes.fromhex("00000003$(ask GO '')")
write = bytes.fromhex("$(req WRITE 1 8 4)") + b"late"
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(8)
    s.connect(os.environ["unixsocket"])
    return s
def on_term(*unused):
    try:
        old.send(write)
        reply = old.recv(16, socket.MSG_WAITALL)
        told = "written" if len(reply) == 16 else "cut"
    except OSError as e:
        told = type(e).__name__
    try:
        if "$SWITCH" != "NO_THREADS": # nobody is accepted meanwhile
            connect().recv(18)
            told += " accepted"
        else:
            told += " refused"
    except socket.timeout:
        told += " hung"
    except OSError:
        told += " refused"
    with open(sys.argv[1], "w") as f: f.write(told)
    os._exit(9)
signal.signal(signal.SIGTERM, on_term)
old = connect()
old.recv(18, socket.MSG_WAITALL)
old.send(greeting)
old.recv(10 + 32 + 20, socket.MSG_WAITALL)
with open(sys.argv[1], "w") as f: f.write("connected")
threading.Event().wait(60)
END
}
testSignalledServerServesItsCommandUntilItHasEnded() {
  holder || return 0
  OUT=$T/out
  for signal in TERM INT HUP; do
    rm -f "$T/told"
    spawn --run "exec python3 '$T/holder.py' '$T/told'" "$DISK"
    await "[ -s '$T/told' ]"
    spawned
    stop $signal
    assertEquals "status after $signal" 9 "$STATUS"
    assertEquals "$signal" 'written refused' "$(cat "$T/told")"
    assertEquals 'what was written last' 6c617465 "$(at 8 4)"
    printf 00000000 | dd of="$DISK" bs=1 seek=8 conv=notrunc 2>/dev/null
  done
}
# Its output and what lingers of it must not keep the test waiting
testSecondSignalEndsAServerWhoseCommandDoesNot() {
  OUT=$T/out
  spawn --run "trap '' TERM; echo \$\$ >'$T/command'; exec sleep 60" mem:1M
  await "[ -s '$T/command' ]"
  spawned
  kill -TERM "$PID"
  sleep 1
  assertTrue 'it waits for the command' "kill -0 $PID"
  stop TERM
  assertEquals 'status' 1 "$STATUS"
  says 'still runs'
  assertTrue 'the command is left alone' "kill -KILL $(cat "$T/command")"
}
testCommandHasTenSecondsToEnd() {
  unhurried || return 0
  OUT=$T/out
  spawn --run "trap '' TERM; echo \$\$ >'$T/command'; exec sleep 60" mem:1M
  await "[ -s '$T/command' ]"
  spawned
  from=$(date +%s)
  stop TERM
  seconds=$(($(date +%s) - from))
  assertEquals 'status' 1 "$STATUS"
  assertTrue "after $seconds s" "[ $seconds -ge 9 ] && [ $seconds -le 20 ]"
  says 'still runs'
  kill -KILL "$(cat "$T/command")"
}
# The signal comes while the server waits to tell that it is ready
testCommandThatASignalForestallsIsAFailure() {
  mkfifo "$T/ready"
  exec 9<>"$T/ready"
  head -c 65536 /dev/zero >&9 # it is full now
  OUT=$T/out
  spawn --ready-fd 9 --run "echo >'$T/ran'" mem:1M
  await "[ -s '$T/pid$NSERVE' ]"
  sleep 0.3
  kill -TERM "$(cat "$T/pid$NSERVE")"
  sleep 0.1
  head -c 65536 <&9 >/dev/null
  wait "$JOB"
  assertEquals 'status' 1 $?
  assertFalse 'it ran' "[ -e '$T/ran' ]"
  exec 9>&-
}
# What counts is the second signal after the command was told
testTwoSignalsAtOnceLeaveTheCommandItsTime() {
  unless NO_THREADS || return 0 # it is told at once there
  for _ in 1 2 3; do
    # shellcheck disable=SC2016
    run --run 'trap "sleep 0.2; exit 9" TERM; kill -TERM $PPID
      kill -HUP $PPID; while :; do sleep 0.02; done' mem:1M
    assertEquals 'status' 9 "$STATUS"
  done
}
testBlockedSignalsDoNotHideTheCommandsEnd() {
  needs python3 || return 0
  timeout -s KILL 10 python3 -c 'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
os.execv(sys.argv[1], sys.argv[1:])' "$NBDSERVE" mem:1M --run 'exit 3'
  assertEquals 'status' 3 $?
}
testAlarmOfSomebodyElseEndsNothing() {
  serve "$DISK"
  kill -ALRM "$PID"
  client hello "$SOCK" ''
}
testPidfileDoesNotReplaceADevice() {
  needs root || return 0
  mknod "$T/node" c 1 3 || { skip 'no devices here'; return 0; }
  run -s -P "$T/node" "$DISK"
  assertEquals 1 "$STATUS"
  says "$T/node: exists and is not a pidfile"
  assertTrue 'it is there' "[ -c '$T/node' ]"
}
testSecondINTEndsAtOnceWhatHasNoCommand() {
  LOG='^nbdserve: .*client'
  mkfifo "$T/in" "$T/out"
  IN=$T/in OUT=$T/out
  spawn -s "$DISK"
  exec 9>"$IN" 8<"$OUT"
  # shellcheck disable=SC2046
  bytes 00000003 "$(ask GO)" $(seq -f 'READ,%g,0,65536' 20) >&9
  sleep 0.5 # it is stuck in a reply that nobody reads
  spawned
  kill -INT "$PID"
  sleep 0.2
  stop INT
  assertEquals 'status' 130 "$STATUS"
  exec 9>&- 8<&-
}
# What the command has left behind is a client that never goes
testCommandsEndEndsAServerThatStillHasAClient() {
  holder || return 0
  OUT=$T/out
  spawn --run "python3 '$T/holder.py' '$T/told' & until [ -s '$T/told' ]; do
    sleep 0.05; done; echo \$! >'$T/command'; exit 3" "$DISK"
  await "[ -s '$T/told' ]"
  await "! kill -0 $(cat "$T/pid$NSERVE") 2>/dev/null" ||
    kill -KILL "$(cat "$T/pid$NSERVE")"
  wait "$JOB"
  assertEquals 'status' 3 $?
  kill -KILL "$(cat "$T/command")"
}

testPidfileIsNotWrittenThroughALink() {
  echo precious >"$T/victim"
  for name in pid.new pid; do
    rm -f "$T/pid" "$T/pid.new"
    ln -s victim "$T/$name"
    run -s -P "$T/pid" "$DISK"
    assertEquals "$name" 0 "$STATUS"
    assertEquals "$name" precious "$(cat "$T/victim")"
  done
}
testPidfileHasTheModeThatTheUmaskLeaves() {
  was=$(umask)
  for mask in 022 027 077; do
    umask $mask
    serve -P "$T/pid" "$DISK"
    umask "$was"
    assertEquals "umask $mask" "$(printf %o $((0666 & ~mask)))" \
      "$(stat -c %a "$T/pid")"
    assertEquals 'its contents' "$PID" "$(cat "$T/pid")"
    stop TERM
  done
}
testPidfileThatCannotBeLeavesNothingBehind() {
  mkdir "$T/here" "$T/here/pid"
  echo 1 >"$T/here/pid/file"
  run -s -P "$T/here/pid" "$DISK"
  assertEquals 1 "$STATUS"
  says "$T/here/pid: "
  assertEquals 'what is left' pid "$(ls "$T/here")"
  run -s -P "$T/none/pid" "$DISK"
  assertEquals 1 "$STATUS"
  says "$T/none/pid: "
}
testPidfileOfASuccessorIsKept() {
  serve -P "$T/pid" "$DISK"
  rm "$T/pid"
  echo 1 >"$T/pid"
  stop TERM
  assertEquals 'of another server' 1 "$(cat "$T/pid")"
}

testFileSaysThatATargetIsOne() {
  cd "$T" || return
  for name in a::b mem:5 x=y file:z mem:; do
    printf %s "$name" >"$name"
    for target in "file:$name" "e=file:$name" "file:$T/$name"; do
      case $target in e=*) export=e ;; *) export='' ;; esac
      ARGS='' DISK=$target SIZE=${#name}
      talk "$(ask GO "$(of $export)")" READ,1,0,2 DISC,0,0,0
      expect "go=export:$SIZE:$FLAGS go=ack" \
        "OK.1=$(of "$(printf %.2s "$name")")"
    done
  done
  serve file:a::b file:mem:5 n=file:x=y
  for export in a::b:4 mem:5:5 n:3; do
    client hello "$SOCK" "${export%:*}"
    assertEquals "$export" "${export##*:}" "$(cat "$T/log")"
  done
  run -s file:absent
  assertEquals 1 "$STATUS"
  says 'file:absent: .*o such file'
  run -s "file:$(printf %05000d 0)"
  assertEquals 1 "$STATUS"
  says '^nbdserve: file:0'
  cd "$here" || return
}

# Beyond this it takes root and a kernel with its own client.
testConnectSaysWhatIsMissing() {
  unless NO_THREADS || return 0
  for device in nbd0 /dev/nbd /dev/nbdx /dev/sda 0 ''; do
    run -c "$device" "$DISK"
    assertEquals "$device" 2 "$STATUS"
    says "--connect $device: not /dev/nbd and a number"
  done
  : >"$T/err"
  run -c /dev/nbd65000 "$DISK"
  assertEquals 1 "$STATUS"
  assertEquals 'one line' 1 "$(wc -l <"$T/err")"
  says '^nbdserve: /dev/nbd65000: no such device .modprobe nbd makes it.$'
  for options in -s '--fd 0' --once '--idle-exit 5' '--sandbox require'; do
    # shellcheck disable=SC2086
    run -c /dev/nbd0 $options "$DISK"
    assertEquals "$options" 2 "$STATUS"
    says "not together with --"
  done
  [ "$SWITCH" != NO_CAS ] || return 0
  cas 0 init "$T/store"
  cas 2 -c /dev/nbd0 "$T/store::"
  says -- '--connect is for one of its volumes'
}
testAServerThatIsKilledWhileItsDeviceIsOpenedLetsGo() {
  ! build connect || does "$W/connect" "$T"
}
testTargetsThatCannotBeServedSayWhy() {
  while IFS='|' read -r expected options target why; do
    # shellcheck disable=SC2086
    run -s $options "$target"
    assertEquals "$options $target" "$expected" "$STATUS"
    says "^nbdserve: $target: $why$"
  done <<END
2||mem:abc|not a size behind mem: .*
2|--size 1|mem:|not a size behind mem: .*
1|--size 2M|mem:1M|--offset and --size reach beyond it
1|--offset 1G|$DISK|--offset and --size reach beyond it
1||/dev/null|neither a file nor a block device
END
}
testRefusedValuesAreToldWhatIsAllowed() {
  while read -r option value allowed; do
    run -s "$option" "$value" "$DISK"
    assertEquals "$option $value" 2 "$STATUS"
    says "^nbdserve: $option $value: .*$allowed"
  done <<'END'
--port 65536 from 0 to 65535$
--port x from 0 to 65535$
--threads 0 from 1 to 1024$
--max-conn 0 from 1 to 1048576$
--stall 0 from 1 to 4000000$
--idle-exit -1 from 1 to 4000000$
--size 0 from 1 to 9223372036854775807$
--create 8E from 1 to 9223372036854775807$
--offset x from 0 to 9223372036854775807$
--fd x from 0 to 2147483647$
--ready-fd 2 from 3 to 2147483647$
--block-size 1:2 not as in .* MIN:PREFERRED:MAX
--cache maybe not one of: writeback writethrough unsafe$
--cache unsafe,writeback not as in --cache MODE:
--sandbox off:auto not as in --sandbox MODE:
--sandbox 1 not one of: auto off require$
--without flush,x flush fua trim zero df multi-conn .* extended
--fault read:EX:1 not one of: EPERM .* ESHUTDOWN$
--fault x:EIO:1 not one of: read write .* all$
--fault read:EIO:2 not as in --fault CMD:ERR:RATE:
--delay read:-1 not as in --delay CMD:MS:
END
  while read -r a b reason; do
    run "$a" "$b" "$DISK"
    assertEquals "$a $b" 2 "$STATUS"
    says "not together with --.*: .*$reason"
  done <<'END'
-s -Ux nobody listens
--run=true -s could not connect
--run=true -1 ends with the command
-T -r nothing to discard
END
}
testBadAddressesSayWhatIsGood() {
  unless NO_TCP || return 0
  run -i no.such.host "$DISK"
  assertEquals 1 "$STATUS"
  says 'no.such.host:10809: .*: not a numeric address'
}

# ==== [15] SOURCE (@source) ==================================================

testMapOfSectionsEqualsTheBanners() {
  assertEquals '' "$(awk '
    / \*\/$/ { code = 1 }
    (code ? /^\/\* ==== \[/ : /^ \* +\[/) {
      gsub(/[()]/, " ")
      key = ""
      for (i = 2; i <= NF; i++) { # number, name, prefix
        if ($i ~ /^=+$/) continue
        key = key " " $i
        if ($i ~ /_$/) break
      }
      seen[key] += code ? 100 : 1
      n++
    }
    END {
      for (key in seen) if (seen[key] != 101) print key
      if (n != 28) print n
    }' "$here/nbdserve.c")"
}
# What make lint and make figures count
testFiguresAreCounted() {
  {
    printf '%s\n' '/* A comment of' ' * two lines. */' '' \
      '#define STRANGE(x) { "no { function"; x; }' \
      'static const int table[] = {1, 2}; /* not a comment line */' '' \
      '/* A function with a comment */' 'static int f(int a) {' \
      '  assert(a > 0 &&' '         a < 10);' \
      '  for (int i = 0; i < a; i++) a += i; /* one statement */' \
      "  if (a == '\"') return 1; /* two */ return 0; // three" '}' ''
    echo 'struct s { int (*call)(void); } one = {f};'
    echo 'void long_one(void) {'
    yes '  f(1);' | head -n 80
    echo '}'
  } >"$T/x.c"
  assertEquals "$(printf '%s\n' 'bad 4: several statements' \
    'bad 12: several statements' 'bad 15: several statements' \
    'bad 16: 82 lines, over 80: void long_one(void) {' 'code 91' 'lone 2' \
    'comment 0.03' 'above 50' 'asserts 11' 'packed 3' 'wide 0' 'functions 2' \
    'median 82' 'p90 82' 'longest 82')" "$(measure "$T/x.c")"
}
# The map of test.sh, its banners, and the banners of nbdserve.c
testMapOfGroupsEqualsTheBanners() {
  sed -n 's/^#   \(\[[0-9]*\]\)  *\([A-Z].*[^ ]\)  *\(@[a-z]*\) .*/\1 \2 \3/p' \
    "$self" | sed 's/  */ /g' >"$T/map"
  sed -n 's/^# ==== \(\[[0-9]*\] .*\) (\(@[a-z]*\)) =*$/\1 \2/p' "$self" \
    >"$T/banners"
  assertEquals 'map and banners' '' "$(diff "$T/map" "$T/banners")"
  assertEquals 16 "$(wc -l <"$T/map")"
  assertEquals 'those of nbdserve.c' '' "$(
    sed -n 's/^\/\* ==== \(\[[0-9]*\] .*\) ([A-Za-z0-9_]*) =*.*/\1/p' \
      "$here/nbdserve.c" >"$T/sections"
    head -n 14 "$T/map" | sed 's/ @.*//' | diff "$T/sections" -)"
}
# A test that was renamed or removed must not stay in a list
testListsNameTestsThatThereAre() {
  all_tests | cut -d' ' -f2 | sort >"$T/all"
  assertEquals 'two of one name' '' "$(uniq -d "$T/all")"
  {
    slow_tests | cut -d' ' -f2
    quick_tests | tr ' ' '\n' | sed '/^$/d'
  } | sort -u >"$T/named"
  assertEquals '' "$(comm -13 "$T/all" "$T/named")"
}
# Two shards share no test and together run all, and so do their choices
testShardsTogetherAreAll() {
  for words in '' quick '@cas @cli'; do
    # shellcheck disable=SC2086
    choose 1/1 $words | sort >"$T/all"
    # shellcheck disable=SC2086
    for n in 1 2; do choose $n/2 $words; done | sort >"$T/both"
    assertEquals "of '$words'" '' "$(diff "$T/all" "$T/both")"
  done
  choose 1/1 quick | while read -r name; do
    all_tests | grep " $name\$"
  done | cut -d' ' -f1 | sort -u >"$T/groups"
  assertEquals 'groups that quick knows' 15 "$(wc -l <"$T/groups")"
}
# Errors have a name that POSIX has, or all systems do (ESHUTDOWN), or that [2]
# defines; ENODATA belongs to an option of POSIX that some BSDs are without
testErrorsHaveNamesThatAllSystemsKnow() {
  printf 'E%s\n' 2BIG ACCES ADDRINUSE ADDRNOTAVAIL AFNOSUPPORT AGAIN BADF \
    BADMSG BUSY CANCELED CONNABORTED CONNREFUSED CONNRESET DOM DQUOT EXIST \
    FBIG INTR INVAL IO ISDIR MFILE NAMETOOLONG NFILE NODEV NOENT NOMEM NOSPC \
    NOSYS NOTCONN NOTDIR NOTEMPTY NOTSOCK NOTSUP NXIO OPNOTSUPP OVERFLOW PERM \
    PIPE PROTO PROTONOSUPPORT RANGE ROFS SHUTDOWN TIMEDOUT UCLEAN WOULDBLOCK |
    sort >"$T/known"
  grep -v '^ *\(/\*\|\*\)' "$here/nbdserve.c" | grep -oE '\<E[A-Z0-9]{2,}\>' |
    grep -vxE 'EOF|ERR|ERROR|EXPORT|EFGH' | sort -u >"$T/used"
  assertContains "$(cat "$T/used")" ENOMEM
  assertEquals '' "$(comm -13 "$T/known" "$T/used")"
}
# Its blocks of that language, as $T/1.LANGUAGE...; prints their names
blocks_of() {
  awk -v kind="$1" -v dir="$T" '
    /^```/ {
      if (!in_block && $0 == "```" kind) { file = dir "/" ++n "." kind }
      else if (file) { close(file); print file; file = "" }
      in_block = !in_block
      next
    }
    file { print >file }' "$here/README"
}
# A directory like a user's: the sources, cc, the program
desk() {
  mkdir "$T/desk" "$T/bin"
  cp "$here/nbdserve.c" "$here/nbdserve.h" "$T/desk"
  cp "$NBDSERVE" "$T/desk/nbdserve"
  printf '#!/bin/sh\nexec %s%s "$@"\n' "$(command -v "${CC%% *}")" \
    "${CC#"${CC%% *}"}" >"$T/bin/cc"
  chmod +x "$T/bin/cc"
  cd "$T/desk" || return
}
# A C block with a main() takes its address and serves until its client leaves
testReadmeCExamplesCompileAndServe() {
  build client || return 0
  desk
  assertNotNull 'C in the README' "$(blocks_of c)"
  for block in $(blocks_of c); do
    program=nbdserve.c
    grep -q '\<main *(' "$block" || program=-c
    # shellcheck disable=SC2086
    does $CC -O1 -DNBDSERVE_NO_MAIN -I. -o example "$block" $program $LDLIBS
    [ $program != -c ] || continue
    timeout 20 ./example "unix:$T/example" 2>>"$T/err" &
    await "[ -S '$T/example' ]"
    client many "$T/example" 1
    wait $!
    assertEquals "status of $block" 0 $?
  done
  cd "$here" || return
}
testReadmeCommandsRun() {
  desk
  path=$PATH
  assertNotNull 'sh in the README' "$(blocks_of sh)"
  for block in $(blocks_of sh); do
    tools=$(sed -n '1s/^# needs://p' "$block")
    for tool in $tools; do
      works=true
      [ "$tool" != nbdsh ] || works=has_nbdsh
      # shellcheck disable=SC2086
      if ! command -v "$tool" >/dev/null || ! $works 2>/dev/null; then
        echo "no $tool here for: $(sed -n 2p "$block")"
        continue 2
      fi
    done
    PATH="$T/bin:/usr/bin:$PATH" setsid timeout 60 sh -eu "$block" \
      >"$T/log" 2>&1 </dev/null &
    JOB=$!
    wait $JOB
    status=$?
    assertEquals "$(cat "$block"): $(tail -n 5 "$T/log")" 0 $status
    kill -TERM "-$JOB" 2>/dev/null # what it left in the background
  done
  PATH=$path
  cd "$here" || return
}
# Each name of the protocol stands in the table once, and each yes has its test
testEachYesOfTheProtocolTableHasATest() {
  table=$(sed -n '/^PROTOCOL/,/^COMMAND LINE/p' "$here/README" | tr ',' '\n')
  for name in OPT_EXPORT_NAME OPT_ABORT OPT_LIST OPT_PEEK_EXPORT OPT_STARTTLS \
    OPT_INFO OPT_GO OPT_STRUCTURED_REPLY OPT_LIST_META_CONTEXT \
    OPT_SET_META_CONTEXT OPT_EXTENDED_HEADERS REP_ACK REP_SERVER REP_INFO \
    REP_META_CONTEXT REP_ERR_UNSUP REP_ERR_POLICY REP_ERR_INVALID \
    REP_ERR_PLATFORM REP_ERR_TLS_REQD REP_ERR_UNKNOWN REP_ERR_SHUTDOWN \
    REP_ERR_BLOCK_SIZE_REQD REP_ERR_TOO_BIG REP_ERR_EXT_HEADER_REQD \
    INFO_EXPORT INFO_NAME INFO_DESCRIPTION INFO_BLOCK_SIZE \
    FLAG_FIXED_NEWSTYLE FLAG_NO_ZEROES FLAG_HAS_FLAGS FLAG_READ_ONLY \
    FLAG_SEND_FLUSH FLAG_SEND_FUA FLAG_ROTATIONAL FLAG_SEND_TRIM \
    FLAG_SEND_WRITE_ZEROES FLAG_SEND_DF FLAG_CAN_MULTI_CONN FLAG_SEND_RESIZE \
    FLAG_SEND_CACHE FLAG_SEND_FAST_ZERO FLAG_BLOCK_STATUS_PAYLOAD CMD_READ \
    CMD_WRITE CMD_DISC CMD_FLUSH CMD_TRIM CMD_CACHE CMD_WRITE_ZEROES \
    CMD_BLOCK_STATUS CMD_RESIZE CMD_FLAG_FUA CMD_FLAG_NO_HOLE CMD_FLAG_DF \
    CMD_FLAG_REQ_ONE CMD_FLAG_FAST_ZERO CMD_FLAG_PAYLOAD_LEN REPLY_FLAG_DONE \
    REPLY_TYPE_NONE REPLY_TYPE_OFFSET_DATA REPLY_TYPE_OFFSET_HOLE \
    REPLY_TYPE_BLOCK_STATUS REPLY_TYPE_BLOCK_STATUS_EXT REPLY_TYPE_ERROR \
    REPLY_TYPE_ERROR_OFFSET STATE_HOLE STATE_ZERO EPERM EIO ENOMEM EINVAL \
    ENOSPC EOVERFLOW ENOTSUP ESHUTDOWN; do
    assertEquals "NBD_$name" 1 \
      "$(printf '%s\n' "$table" | grep -c "^ *NBD_$name\( .*\)*\$")"
  done
  printf '%s\n' "$table" | sed -n 's/.*yes: //p' | sort -u >"$T/names"
  assertTrue 'there are many' "[ $(wc -l <"$T/names") -gt 40 ]"
  while read -r name; do
    assertEquals "test$name" 1 "$(grep -c "^test$name()" "$self")"
  done <"$T/names"
}
testReadmeHasTheHelpText() {
  unless NO_CAS || return 0
  "$NBDSERVE" --help >"$T/help"
  awk -v lines="$(wc -l <"$T/help")" '
    match($0, /^ *usage: /) && !n { n = lines; indent = RLENGTH - 7 }
    n > 0 { n--; print substr($0, indent + 1) }' "$here/README" >"$T/readme"
  assertEquals '' "$(diff "$T/help" "$T/readme")"
}
# In a copy, as `make` would replace the program that is being tested
testInstallLeavesWhatASystemWants() {
  needs make ar || return 0
  case $CC in tcc | musl-gcc) return 0 ;; esac
  mkdir "$T/src" "$T/root"
  for file in nbdserve.c nbdserve.h Makefile test.sh README; do
    cp "$here/$file" "$T/src/"
  done
  (
    unset NBDSERVE
    set -- make -C "$T/src" "CC=$CC" 'CFLAGS=-O0' DESTDIR="$T/root" PREFIX=/usr
    "$@" shared && "$@" install
  ) >"$T/log" 2>&1
  assertEquals "make install: $(tail -n 3 "$T/log")" 0 $?
  in=$T/root/usr
  assertTrue 'the program' "'$in/bin/nbdserve' --version >/dev/null"
  for page in 1 3; do
    file=$in/share/man/man$page/nbdserve.$page
    assertTrue "$file" "grep -q '^[.]TH NBDSERVE $page' '$file'"
    ! command -v man >/dev/null || assertEquals "$page: warnings" '' \
      "$(MANROFFOPT=-ww man --warnings -l "$file" 2>&1 >/dev/null)"
  done
  for word in --accept-loss snapshot nbdserve_cas_volume; do
    assertTrue "$word" \
      "cat '$in/share/man/man'?/* | tr -d '\\\\' | grep -q -e '$word'"
  done
  assertTrue 'pkg-config' "grep -q '^libdir=/usr/lib$' \
    '$in/lib/pkgconfig/nbdserve.pc'"
  ! command -v bash >/dev/null || assertEquals 'completion' 'snapshot' "$(
    bash -c '. "$1"; COMP_CWORD=1; _nbdserve nbdserve sna; echo $COMPREPLY' - \
      "$in/share/bash-completion/completions/nbdserve")"
  cat >"$T/host.c" <<'END'
#include <nbdserve.h>
#include <string.h>
int main(void) { return strcmp(nbdserve_version(), NBDSERVE_VERSION); }
END
  # shellcheck disable=SC2086
  does $CC $CFLAGS -I"$in/include" -o "$T/host" "$T/host.c" -L"$in/lib" \
    -lnbdserve -lpthread
  LD_LIBRARY_PATH=$in/lib "$T/host"
  assertEquals 'with the shared library' 0 $?
  make -C "$T/src" DESTDIR="$T/root" PREFIX=/usr uninstall >"$T/log" 2>&1
  assertEquals 'left by uninstall' '' "$(find "$T/root" ! -type d)"
}
testHeaderServesCxx98() {
  needs c++ || return 0
  cat >"$T/x.cc" <<'END'
#include "nbdserve.h"
int main() {
  struct nbdserve *s;
  struct nbdserve_config config = nbdserve_config();
  config.version = NBDSERVE_VERSION_NUMBER;
  if (nbdserve_new(&s, &config) != 0) return 1;
  nbdserve_free(s);
  return 0;
}
END
  # shellcheck disable=SC2086
  does $CC $CFLAGS -DNBDSERVE_NO_MAIN -c -o "$T/n.o" "$here/nbdserve.c"
  # shellcheck disable=SC2086
  does c++ $CFLAGS -std=c++98 -Wall -Wextra -pedantic -Werror -I"$here" \
    -o "$T/x" "$T/x.cc" "$T/n.o" $LDLIBS
  does "$T/x"
}

# ==== [16] CLIENTS (@clients) ================================================

testNbdinfoActivatesIt() {
  needs nbdinfo || return 0
  does nbdinfo --size [ "$NBDSERVE" "$DISK" ]
  assertEquals 65536 "$(cat "$T/log")"
}
testNbdcopyMovesAnImageInAndOutOfAStore() {
  needs nbdcopy && store || return 0
  truncate -s 32M "$T/in"
  for mib in 1 3 4 17; do
    noise 3000000 | dd of="$T/in" bs=1M seek=$mib conv=notrunc 2>/dev/null
  done
  cas 0 create "$S::v" 32M
  serve "$S::v"
  does nbdcopy --connections=4 --flush "$T/in" "$URI"
  does nbdcopy --connections=4 "$URI" "$T/copy"
  assertTrue "cmp '$T/in' '$T/copy'"
  stop TERM
  same v "$T/in"
  cas 0 verify "$S"
}
testFilesystemInAStoreIsSound() {
  needs mke2fs e2fsck nbdcopy && store || return 0
  if ! mke2fs -V 2>&1 | grep -q '^mke2fs 1'; then
    skip 'this mke2fs knows no -d'
    return 0
  fi
  mkdir "$T/tree"
  cp "$self" "$T/tree"
  truncate -s 16M "$T/fs"
  does mke2fs -q -t ext4 -d "$T/tree" "$T/fs"
  cas 0 create "$S::fs" 16M
  serve "$S::fs"
  does nbdcopy --flush "$T/fs" "$URI"
  does nbdcopy "$URI" "$T/copy"
  does e2fsck -fn "$T/copy"
}
testFioVerifiesWhatItWroteToAVolume() {
  needs fio && store || return 0
  fio --enghelp | grep -q '[^a-z]nbd$' || { skip 'fio has no nbd'; return; }
  cas 0 create "$S::v" 32M
  serve "$S::v"
  (cd "$T" && does fio --name=v --ioengine=nbd --uri="$URI" --rw=randwrite \
    --bs=4k --iodepth=16 --numjobs=4 --size=8M --offset_increment=8M \
    --verify=crc32c --output-format=terse --verify_fatal=1)
  stop TERM
  cas 0 verify "$S"
}
testQemuSeesTheHolesOfAVolume() {
  needs qemu-img && store || return 0
  truncate -s 8M "$T/in"
  noise 1048576 | dd of="$T/in" bs=1M seek=2 conv=notrunc 2>/dev/null
  cas 0 create "$S::v" 8M
  serve "$S::v"
  does qemu-img convert -n -f raw -O raw "$T/in" "$URI"
  does qemu-img map --output=json -f raw "$URI"
  assertEquals '0 2097152 false|2097152 1048576 true|3145728 5242880 false|' \
    "$(tr '{' '\n' <"$T/log" | sed -n 's/.*"start": \([0-9]*\), "length": '\
'\([0-9]*\),.*"data": \([a-z]*\).*/\1 \2 \3/p' | tr '\n' '|')"
  does qemu-img compare -f raw -F raw "$T/in" "$URI"
}
testQemuIoTrimsZeroesAndWritesPartsOfBlocks() {
  needs qemu-io && store || return 0
  cas 0 create "$S::v" 4M
  serve "$S::v"
  does qemu-io -f raw "$URI" -c 'write -P 7 0 1M' -c 'write -z 64k 64k' \
    -c 'write -z -u 256k 64k' -c 'discard 512k 128k' -c flush \
    -c 'read -P 7 0 64k' -c 'read -P 0 64k 64k' -c 'read -P 0 256k 64k' \
    -c 'write -f -P 9 1000000 3' -c 'read -P 9 1000000 3' \
    -c 'write -z 3000 5000' -c 'read -P 7 2000 1000' -c 'read -P 0 3000 5000' \
    -c 'read -P 7 8000 1000' -c 'discard 20001 9999' -c 'read -P 7 20000 1' \
    -c 'read -P 7 30000 2000' -c map
  assertNotContains "$(cat "$T/log")" 'Pattern verification failed'
  stop TERM
  cas 0 verify "$S"
}
testNbdinfoDescribesIt() {
  needs nbdinfo || return 0
  serve -e name -D text "$DISK"
  does nbdinfo "$URI"
  multi='can_multi_conn: true'
  [ "$SWITCH" != NO_THREADS ] || multi='can_multi_conn: false'
  for line in 'export-size: 65536' "$multi" 'can_zero: true' \
    'can_fast_zero: true' 'is_read_only: false' 'can_df: true' \
    'description: text' 'base:allocation' 'structured'; do
    assertContains "$(cat "$T/log")" "$line"
  done
  does nbdinfo --list "$URI"
  assertContains "$(cat "$T/log")" 'export="name"'
}
testNbdinfoMapsHoles() {
  needs nbdinfo || return 0
  filled || return 0
  truncate -s 3M "$DISK"
  serve "$DISK"
  does nbdinfo --map "$URI"
  assertEquals '0 1048576 0 data|1048576 2097152 3 hole,zero|' \
    "$(tr -s ' ' <"$T/log" | sed 's/^ //' | tr '\n' '|')"
}
testNbdcopyMovesAnImageInAndOut() {
  needs nbdcopy || return 0
  truncate -s "${BIG:-64M}" "$DISK" "$T/in"
  size=$(wc -c <"$DISK")
  for mib in 1 3 4 17 40; do
    noise 3000000 |
      dd of="$T/in" bs=1M seek=$mib conv=notrunc 2>/dev/null
  done
  noise 777 |
    dd of="$T/in" bs=1 seek=$((size - 777)) conv=notrunc 2>/dev/null
  serve "$DISK"
  does nbdcopy --connections=4 --flush "$T/in" "$URI"
  assertTrue 'in' "cmp '$T/in' '$DISK'"
  does nbdcopy --connections=4 "$URI" "$T/out"
  assertTrue 'out' "cmp '$T/in' '$T/out'"
}
testQemuImgConvertsIntoIt() {
  needs qemu-img || return 0
  noise 3000000 >"$T/raw"
  truncate -s 8M "$T/raw" "$DISK"
  does qemu-img convert -f raw -O qcow2 "$T/raw" "$T/qcow2"
  serve "$DISK"
  does qemu-img convert -n -f qcow2 -O raw "$T/qcow2" "$URI"
  does qemu-img compare -f qcow2 -F raw "$T/qcow2" "$URI"
  assertTrue "cmp '$T/raw' '$DISK'"
}
testQemuIoWritesZeroesAndDiscards() {
  needs qemu-io || return 0
  truncate -s 4M "$DISK"
  serve "$DISK"
  does qemu-io -f raw "$URI" -c 'write -P 7 0 1M' -c 'write -z 64k 64k' \
    -c 'write -z -u 256k 64k' -c 'discard 512k 128k' -c flush \
    -c 'read -P 7 0 64k' -c 'read -P 0 64k 64k' -c 'read -P 0 256k 64k' \
    -c 'write -f -P 9 1000000 3' -c 'read -P 9 1000000 3' -c map
  assertNotContains "$(cat "$T/log")" 'Pattern verification failed'
  assertEquals 070909090700 "$(at 999999 5)$(at 1048576 1)"
}
testFilesystemCopiedInIsSound() {
  needs mke2fs e2fsck nbdcopy || return 0
  if ! mke2fs -V 2>&1 | grep -q '^mke2fs 1'; then # busybox has another
    skip 'this mke2fs knows no -d'
    return 0
  fi
  mkdir "$T/tree"
  cp "$self" "$T/tree"
  truncate -s 16M "$T/fs" "$DISK"
  does mke2fs -q -t ext4 -d "$T/tree" "$T/fs"
  serve "$DISK"
  does nbdcopy --flush "$T/fs" "$URI"
  stop TERM
  does e2fsck -fn "$DISK"
}
testFioVerifiesWhatItWrote() {
  needs fio || return 0
  fio --enghelp | grep -q '[^a-z]nbd$' || { skip 'fio has no nbd'; return; }
  truncate -s 16M "$DISK"
  serve "$DISK"
  (cd "$T" && does fio --name=v --ioengine=nbd --uri="$URI" --rw=randwrite \
    --bs=4k --iodepth=64 --size=16M --verify=crc32c --output-format=terse \
    --verify_fatal=1)
}
# Is there an nbdsh that starts?  (Not with any other Python than Debian's.)
has_nbdsh() {
  needs nbdsh || return 1
  [ -e "$W/nbdsh" ] || env PATH="/usr/bin:$PATH" nbdsh -c pass 2>/dev/null ||
    { skip 'nbdsh does not start'; return 1; }
  : >"$W/nbdsh"
}
# Runs the Python on stdin with nbdsh's h and nbd, uri, which is the last
# server's, and refused(error, call...): so must that call fail
nbd_python() {
  does env PATH="/usr/bin:$PATH" nbdsh -c "uri = '$URI'" -c '
import errno
def refused(error, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == error, (error, e)
    else:
        assert False, (error, call, args)
' -c "$(cat)"
}
# The same changes of the same disk, with data, zeroes and discarded, bytes and
# blocks; at grains of a block and of a cluster of QEMU's
testChangedBlocksAreThoseOfAQcow2Bitmap() {
  needs qemu-img qemu-io qemu-nbd nbdinfo || return 0
  store || return 0
  head -c 6291456 /dev/zero | tr '\0' '\5' >"$T/in"
  truncate -s 12M "$T/in"
  for grain in 4096 65536; do
    image=$T/$grain.qcow2 volume=v$grain
    changes='write -P 7 5000 10;write -P 7 100000 9000;write -P 7 9M 4096
write -z 4158k 64k;write -P 7 12578608 4304;discard 1536k 64k;write -z 1M 4096'
    [ $grain = 4096 ] ||
      changes='write -P 7 64k 64k;discard 1M 128k;write -z 4M 64k
write -P 7 8M 1M;write -P 7 11M 1M'
    does qemu-img convert -f raw -O qcow2 "$T/in" "$image"
    does qemu-img bitmap --add -g $grain "$image" b || return 0
    cas 0 import "$S::$volume" "$T/in"
    cas 0 snapshot "$S::$volume@b"
    serve "$S::$volume"
    echo "$changes" | tr ';' '\n' >"$T/changes"
    while read -r change; do
      does qemu-io -d unmap -f qcow2 -c "$change" "$image" >/dev/null </dev/null
      does qemu-io -d unmap -f raw -c "$change" "$URI" >/dev/null </dev/null
    done <"$T/changes"
    nbdinfo --map=qemu:dirty-bitmap:b "$URI" >"$T/ours"
    qemu-nbd -r -t -f qcow2 -B b -k "$T/q$grain" "$image" &
    peer=$!
    await '[ -S "$T/q$grain" ]'
    nbdinfo --map=qemu:dirty-bitmap:b "nbd+unix:///?socket=$T/q$grain" \
      >"$T/theirs"
    kill $peer
    wait $peer 2>/dev/null
    assertEquals "$(cat "$T/theirs")" "$(cat "$T/ours")"
    ranges=$(wc -l <"$T/changes")
    assertEquals 'ranges' "$ranges" "$(grep -c dirty "$T/ours")"
    image=driver=nbd,server.type=unix,server.path=$SOCK,export=$volume
    image=$image,x-dirty-bitmap=qemu:dirty-bitmap:b
    qemu-img map --output=json --image-opts "$image" >"$T/map"
    assertEquals 'no data' "$ranges" "$(grep -c '"data": false' "$T/map")"
    stop TERM
  done
}
# Three increments, one after the other, into a file.  The volume is written
# meanwhile, in any case between the answer of what has changed and the reads.
testIncrementalBackupOfAVolumeThatIsBeingWritten() {
  has_nbdsh || return 0
  unless NO_THREADS || return 0 # two clients
  store || return 0
  noise 9000000 >"$T/in"
  cas 0 import "$S::v" "$T/in"
  cas 0 snapshot "$S::v@a"
  cas 0 export "$S::v@a" "$T/backup"
  serve "$S::"
  nbd_python <<END
import subprocess, threading, time
at = lambda name: "nbd+unix:///" + name + "?socket=$SOCK"
other = nbd.NBD()
other.connect_uri(at("v"))
n = 0 # requests that were done,
allowed = 0 # and may be: not all of the volume is to change in one round
stop = False
def write():
    global n
    while not stop:
        if n < allowed:
            off = n * 77777 % 8900000
            if n % 7 == 3: other.trim(8192, off // 4096 * 4096)
            elif n % 7 == 5: other.zero(9000, off)
            else: other.pwrite(n.to_bytes(8, "big") * 1000, off)
            n += 1
        time.sleep(0.001)
    other.flush()
def await_writes():
    global allowed
    end = n + 5
    allowed = max(allowed, end)
    while n < end: time.sleep(0.001)
def ask(name, size, *contexts):
    h, got = nbd.NBD(), {}
    for context in contexts: h.add_meta_context(context)
    h.connect_uri(at(name))
    h.block_status(size or h.get_size(), 0,
                   lambda name, off, extents, err: got.update({name: extents}))
    return h, got
writer = threading.Thread(target=write)
writer.start()
try:
    for old, new in "ab", "bc", "cd":
        allowed = n + 100
        await_writes()
        subprocess.check_call(["$NBDSERVE", "snapshot", "$S::v@" + new])
        since, itself = ["qemu:dirty-bitmap:" + name for name in (old, new)]
        h, got = ask("v@" + new, 0, "base:allocation", since, itself)
        assert not h.can_meta_context(itself)
        assert sorted(got) == ["base:allocation", since], got
        await_writes()
        off = copied = 0
        with open("$T/backup", "r+b") as backup:
            for length, status in zip(got[since][::2], got[since][1::2]):
                if status & 1:
                    backup.seek(off)
                    backup.write(h.pread(length, off))
                    copied += length
                off += length
        assert off == h.get_size() and 0 < copied < off // 2, copied
finally:
    stop = True
    writer.join()
live, got = ask("v", 4096, "base:allocation", since, itself)
assert len(got) == 3, got
END
  same v@d "$T/backup"
  stop TERM
  cas 0 verify "$S"
  cas 0 seal "$S::v@d"
  id=$(cat "$T/out")
  cas 0 init "$T/restored"
  cas 0 import "$T/restored::w" "$T/backup"
  cas 0 snapshot "$T/restored::w@d"
  cas 0 seal "$T/restored::w@d"
  assertEquals 'the id of what was restored' "$id" "$(cat "$T/out")"
}
testLibnbdReadsChunksAndExtents() {
  has_nbdsh || return 0
  filled || return 0
  truncate -s 3M "$DISK"
  serve "$DISK"
  nbd_python <<'END'
h.add_meta_context("base:allocation")
h.connect_uri(uri)
MB, got = 1048576, []
def chunk(buf, offset, status, err): got.append((offset, len(buf), status))
def extent(context, offset, entries, err): got.append((offset, entries))
assert h.pread_structured(2 * MB, 0, chunk) == b"x" * MB + b"\0" * MB
assert sum(n for offset, n, status in got) == 2 * MB
assert {status for offset, n, status in got if offset >= MB} == {nbd.READ_HOLE}
assert {status for offset, n, status in got if offset < MB} == {nbd.READ_DATA}
got = []
assert h.pread_structured(MB, MB // 2, chunk, nbd.CMD_FLAG_DF) == \
    b"x" * (MB // 2) + b"\0" * (MB // 2)
assert got == [(MB // 2, MB, nbd.READ_DATA)], got
got = []
h.pread_structured(512, MB, chunk, nbd.CMD_FLAG_DF)
h.pread_structured(100, MB - 50, chunk)
assert got == [(MB, 512, nbd.READ_HOLE), (MB - 50, 100, nbd.READ_DATA)], got
got = []
h.block_status(3 * MB, 0, extent)
h.block_status(2 * MB, 100, extent, nbd.CMD_FLAG_REQ_ONE)
h.block_status(2 * MB, MB // 2, extent)
h.block_status(100, MB, extent)
assert got == [(0, [MB, 0, 2 * MB, 3]), (100, [MB - 100, 0]),
    (MB // 2, [MB // 2, 0, 3 * MB // 2, 3]), (MB, [100, 3])], got
h.shutdown()
END
}
testLibnbdGetsTheErrorOfEachBadRequest() {
  has_nbdsh || return 0
  truncate -s 3M "$DISK"
  serve "$DISK"
  nbd_python <<'END'
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
def extent(*args): pass
MB, end = 1048576, 3145728
for call, error in ((h.pread, errno.EINVAL), (h.trim, errno.EINVAL),
                    (h.cache, errno.EINVAL), (h.zero, errno.ENOSPC)):
    for count, offset in ((2, end - 1), (1, end), (1, 1 << 63), (5, 2**64 - 2)):
        refused(error, call, count, offset)
    refused(errno.EINVAL, call, 1, 0, 0x100)
    refused(errno.EINVAL, call, 1, 0, nbd.CMD_FLAG_REQ_ONE)
refused(errno.ENOSPC, h.pwrite, b"xx", end - 1)
refused(errno.ENOSPC, h.pwrite, b"x", 2**64 - 1)
refused(errno.EINVAL, h.pwrite, b"x", 0, nbd.CMD_FLAG_NO_HOLE)
refused(errno.EINVAL, h.pwrite, b"x", 0, 0x8000)
refused(errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
refused(errno.EINVAL, h.block_status, 2, end - 1, extent)
refused(errno.EINVAL, h.block_status, 2, 0, extent, nbd.CMD_FLAG_NO_HOLE)
refused(errno.EOVERFLOW, h.pread_structured, 2 * MB, 0, extent,
        nbd.CMD_FLAG_DF)
assert h.pread(0, 0) == b""
for call in h.zero, h.trim, h.cache: call(0, 0)
h.pwrite(b"", 0)
assert h.pread(8, 0) == b"nbdserve" # all were refused, and nothing is lost
h.shutdown()
END
}
testLibnbdWritesZeroesTrimsAndCaches() {
  has_nbdsh || return 0
  head -c 65536 /dev/zero | tr '\0' x >"$DISK"
  serve "$DISK"
  nbd_python <<'END'
h.connect_uri(uri)
fua, no_hole, fast = (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE,
                      nbd.CMD_FLAG_FAST_ZERO)
expected = bytearray(b"x" * 65536)
at = 100
for flags in (0, fua, no_hole, fua | no_hole, fast, fast | fua, fast | no_hole,
              fast | no_hole | fua):
    try:
        h.zero(4000, at, flags)
        expected[at:at + 4000] = bytes(4000)
    except nbd.Error as e:
        assert flags & fast and e.errnum == errno.ENOTSUP, e
    at += 5000
h.pwrite(b"abc", 50000)
h.pwrite(b"def", 50003, fua)
expected[50000:50006] = b"abcdef"
h.cache(1000, 3)
h.flush()
assert h.pread(65536, 0) == expected
h.trim(4096, 57344)
h.trim(4096, 61440, fua)
assert h.pread(57344, 0) == expected[:57344]
h.shutdown()
END
}
testLibnbdSeesWhatAnExportOffers() {
  has_nbdsh || return 0
  unless NO_THREADS || return 0
  serve -e 'a name' -D 'a text' "$DISK"
  nbd_python <<'END'
h.set_full_info(True)
h.add_meta_context("base:allocation")
h.add_meta_context("x-other:context")
h.connect_uri(uri)
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated() and h.get_size() == 65536
assert h.get_canonical_export_name() == "a name"
assert h.get_export_description() == "a text"
assert [h.get_block_size(i) for i in range(3)] == [1, 4096, 33554432]
assert h.can_meta_context("base:allocation")
assert not h.can_meta_context("x-other:context")
for can in (h.can_cache, h.can_df, h.can_fast_zero, h.can_flush, h.can_fua,
            h.can_multi_conn, h.can_trim, h.can_zero):
    assert can(), can
assert not h.is_read_only() and not h.is_rotational()
h.shutdown()
END
  stop TERM
  serve -r "$DISK"
  nbd_python <<'END'
h.set_full_info(True)
h.connect_uri(uri)
assert h.get_canonical_export_name() == ""
refused(errno.ENOTSUP, h.get_export_description)
assert h.is_read_only() and not h.is_rotational()
for can in h.can_cache, h.can_df, h.can_multi_conn: assert can(), can
for can in (h.can_fast_zero, h.can_flush, h.can_fua, h.can_trim, h.can_zero):
    assert not can(), can
h.set_strict_mode(0)
refused(errno.EPERM, h.pwrite, b"x", 0)
refused(errno.EPERM, h.pwrite, b"x", 0, nbd.CMD_FLAG_FUA)
refused(errno.EPERM, h.zero, 512, 0)
refused(errno.EPERM, h.trim, 512, 0)
h.cache(512, 0)
assert h.pread(8, 0) == b"nbdserve"
h.shutdown()
END
}
testLibnbdHagglesOptionByOption() {
  has_nbdsh || return 0
  serve -D text a="$DISK" b=mem:1K
  nbd_python <<'END'
got = []
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(uri)
assert h.opt_list(lambda *args: got.append(args)) == 2
assert got == [("a", "text"), ("b", "text")], got
for name, size in ("b", 1024), ("a", 65536):
    h.set_export_name(name)
    h.opt_info()
    assert h.get_size() == size and h.get_canonical_export_name() == name
    assert h.get_export_description() == "text" and not h.is_read_only()
h.set_export_name("none")
refused(errno.ENOENT, h.opt_info)
refused(errno.ENOENT, h.opt_go)
h.set_export_name("a")
got = []
for contexts in [], ["base:"], ["x-other:", "base:allocation"], ["x-other:"]:
    h.clear_meta_contexts()
    for context in contexts: h.add_meta_context(context)
    h.opt_list_meta_context(got.append)
assert got == ["base:allocation"] * 3, got
h.add_meta_context("base:allocation")
h.opt_go()
assert h.get_size() == 65536 and h.can_meta_context("base:allocation")
assert h.pread(8, 0) == b"nbdserve"
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
assert h.aio_is_closed()
END
}
testLibnbdTakesOrRefusesBlockSizes() {
  has_nbdsh || return 0
  serve -b 512:4096:1M "$DISK"
  nbd_python <<'END'
h.set_strict_mode(0)
h.set_opt_mode(True)
h.set_request_block_size(False)
h.connect_uri(uri)
refused(errno.EINVAL, h.opt_info)
refused(errno.EINVAL, h.opt_go)
h.set_request_block_size(True)
h.opt_go()
assert [h.get_block_size(i) for i in range(3)] == [512, 4096, 1048576]
refused(errno.EINVAL, h.pread, 1, 0)
refused(errno.EINVAL, h.pread, 512, 1)
refused(errno.EINVAL, h.pwrite, b"x", 512)
refused(errno.EINVAL, h.zero, 100, 0)
refused(errno.EINVAL, h.trim, 512, 100)
refused(errno.EINVAL, h.cache, 1, 0)
assert h.pread(512, 0)[:8] == b"nbdserve"
h.shutdown()
END
}
testLibnbdAsAnOldClient() {
  has_nbdsh || return 0
  LOG='^nbdserve: .*client'
  serve -e old "$DISK"
  nbd_python <<'END'
for flags in range(4): # FIXED_NEWSTYLE, NO_ZEROES
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_handshake_flags(flags)
    h.set_request_structured_replies(False)
    h.connect_uri(uri)
    assert h.get_protocol() == "newstyle" + ("-fixed" if flags & 1 else "")
    assert h.get_size() == 65536 and not h.can_df()
    assert not h.get_structured_replies_negotiated()
    assert h.pread(8, 0) == b"nbdserve"
    refused(errno.EINVAL, h.pread, 1, 65536)
    refused(errno.EINVAL, h.block_status, 512, 0, lambda *args: None)
    h.pwrite(b"n", 0)
    h.shutdown()
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    try:
        h.connect_uri(uri.replace("/old?", "/new?"))
    except nbd.Error:
        continue
    assert False
END
}
testLibnbdLeavesWithRequestsInFlight() {
  has_nbdsh || return 0
  serve "$DISK"
  nbd_python <<'END'
h.connect_uri(uri)
for i in range(200): h.aio_pread(nbd.Buffer(16384), i * 200)
for i in range(200):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"z" * 50)), i * 50)
h.aio_flush()
h.aio_disconnect()
while not h.aio_is_closed() and not h.aio_is_dead(): h.poll(-1)
assert h.aio_is_closed() and h.aio_in_flight() == 0
END
  assertEquals 7a7a00 "$(at 9998 3)"
}
testQemuImgSeesAndKeepsHoles() {
  needs qemu-img || return 0
  filled || return 0
  truncate -s 3M "$DISK"
  cp "$DISK" "$T/in"
  serve "$DISK"
  does qemu-img map --output=json -f raw "$URI"
  assertEquals '"start":0"length":1048576"zero":false"start":1048576'\
'"length":2097152"zero":true' "$(tr -d ' \n' <"$T/log" |
    grep -o '"\(start\|length\|zero\)":[a-z0-9]*' | tr -d '\n')"
  does qemu-img convert -f raw -O raw "$URI" "$T/out"
  assertTrue 'out' "cmp '$T/in' '$T/out'"
  assertTrue 'holes out' "[ $(du -k "$T/out" | cut -f1) -le $((full + 64)) ]"
  stop TERM
  noise 3145728 >"$DISK"
  serve "$DISK"
  does qemu-img convert -n -f raw -O raw "$T/in" "$URI"
  assertTrue 'in' "cmp '$T/in' '$DISK'"
  assertTrue 'holes in' "[ $(blocks) -le $((full + 64)) ]"
}
testQemuIoIsToldWhyARequestFails() {
  needs qemu-io || return 0
  head -c 4194304 /dev/zero | tr '\0' x >"$DISK"
  printf '#!/bin/sh\nulimit -f 4096\nexec "%s" "$@"\n' "$NBDSERVE" >"$T/limit"
  chmod +x "$T/limit"
  was=$NBDSERVE NBDSERVE=$T/limit LOG='^nbdserve: .*client'
  serve --size 4M "$DISK"
  NBDSERVE=$was
  truncate -s 1M "$DISK"
  for what in 'write 3M 64k:No space left on device' \
    'read 2M 64k:Input/output error' 'read 512k 2M:Input/output error'; do
    timeout 20 qemu-io -f raw "$URI" -c "${what%:*}" >"$T/log" 2>&1
    assertContains "$(cat "$T/log")" "${what#*:}"
  done
  does qemu-io -f raw "$URI" -c 'read -P 120 0 1M'
  stop TERM
  serve -r "$DISK"
  timeout 20 qemu-io -f raw "$URI" -c 'write 0 1' >"$T/log" 2>&1
  assertContains "$(cat "$T/log")" 'Permission denied'
  does qemu-io -r -f raw "$URI" -c 'read -P 120 0 1M'
}
testNbdClientListsTheExports() {
  needs nbd-client || return 0
  tcp || return 0
  start -p 0 one=mem:1K two=mem:1K
  port=${URI#nbd://127.0.0.1:}
  does nbd-client -l 127.0.0.1 "${port%%/*}"
  assertContains "$(cat "$T/log")" one
  assertContains "$(cat "$T/log")" two
}

# shellcheck disable=SC2086
set -- -- $SELECTED
. shunit2

//== client unit fault bench
/* A small NBD client of its own: it shares no line with what it checks.  Each
 * program's own part, further down, begins with the promise of README that the
 * program defends. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(x) ((x) ? (void)0 : t_fail(__LINE__, #x))
#define COUNT(a) ((int)(sizeof(a) / sizeof(a)[0]))

enum {
  READ,
  WRITE,
  DISC,
  FLUSH,
  TRIM,
  CACHE,
  ZEROES,
  STATUS
};
enum {
  FUA = 1,
  NO_HOLE = 2,
  DF = 4,
  REQ_ONE = 8,
  FAST = 16,
  PAYLOAD = 32
};

static void t_fail(int line, const char *what) {
  fprintf(stderr, "test.sh:%d: not so: %s (errno %d)\n", line, what, errno);
  _exit(1);
}

static void t_put(unsigned char *p, int n, uint64_t v) {
  while (n > 0)
    p[--n] = (unsigned char)v, v >>= 8;
}

static uint64_t t_get(const unsigned char *p, int n) {
  uint64_t v = 0;
  while (n-- > 0)
    v = v << 8 | *p++;
  return v;
}

/* Number of bytes until the end of the stream or an error */
static size_t t_read(int fd, void *buf, size_t len) {
  size_t n = 0;
  while (n < len) {
    ssize_t r = read(fd, (char *)buf + n, len - n);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) break;
    n += (size_t)r;
  }
  return n;
}

static int t_write(int fd, const void *buf, size_t len) {
  size_t n = 0;
  while (n < len) {
    ssize_t r = send(fd, (const char *)buf + n, len - n, MSG_NOSIGNAL);
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) return -1;
    n += (size_t)r;
  }
  return 0;
}

struct t_conn {
  int fd, structured; /* 2: extended */
  uint64_t size;
  unsigned flags;
  uint32_t cookie; /* of the last t_do */
};

struct t_reply { /* a simple reply or a chunk; a hole is data that is zero */
  uint64_t cookie, off;
  uint64_t start; /* of the request, if it has extended headers */
  uint32_t error, len;
  int chunk, done; /* chunk: its type, -1 for a simple reply */
  unsigned char *data;
  size_t room;
};

static int t_option(int fd, uint32_t option, const void *data, uint32_t len) {
  unsigned char h[16];
  memcpy(h, "IHAVEOPT", 8);
  t_put(h + 8, 4, option);
  t_put(h + 12, 4, len);
  return t_write(fd, h, 16) || t_write(fd, data, len) ? -1 : 0;
}

/* The type of the next reply to an option, 0 at the end of the stream */
static uint32_t t_answer(int fd, unsigned char data[4200]) {
  unsigned char h[20];
  size_t len;
  if (t_read(fd, h, 20) != 20) return 0;
  CHECK(t_get(h, 8) == UINT64_C(0x3e889045565a9));
  len = (size_t)t_get(h + 16, 4);
  CHECK(len <= 4200);
  if (t_read(fd, data, len) != len) return 0;
  return (uint32_t)t_get(h + 12, 4);
}

/* The handshake: 0, or -1 when the server refuses or ends it */
static int t_open(struct t_conn *c, int fd, const char *name, int structured) {
  unsigned char b[4200], p[4200];
  uint32_t type, n = (uint32_t)strlen(name);

  memset(c, 0, sizeof *c);
  c->fd = fd;
  c->structured = structured;
  if (t_read(fd, b, 18) != 18) return -1;
  CHECK(memcmp(b, "NBDMAGICIHAVEOPT\0\3", 18) == 0);
  t_put(b, 4, 3);
  if (t_write(fd, b, 4)) return -1;
  t_put(p, 4, n);
  memcpy(p + 4, name, n);
  if (structured) {
    if (t_option(fd, structured > 1 ? 11 : 8, "", 0)) return -1;
    if (t_answer(fd, b) != 1) return -1;
    t_put(p + 4 + n, 4, 1);
    t_put(p + 8 + n, 4, 15);
    memcpy(p + 12 + n, "base:allocation", 15);
    if (t_option(fd, 10, p, n + 27) || t_answer(fd, b) != 4) return -1;
    if (t_answer(fd, b) != 1) return -1;
  }
  t_put(p + 4 + n, 2, 0);
  if (t_option(fd, 7, p, n + 6)) return -1;
  while ((type = t_answer(fd, b)) == 3)
    if (t_get(b, 2) == 0) {
      c->size = t_get(b + 2, 8);
      c->flags = (unsigned)t_get(b + 10, 2);
    }
  return type == 1 ? 0 : -1;
}

/* A request's head; the upper half of a READ's cookie is its length (see req
 * above) */
static void t_head(unsigned char h[28], int flags, int command, uint32_t cookie,
                   uint64_t off, uint32_t len) {
  t_put(h, 4, 0x25609513);
  t_put(h + 4, 2, (uint64_t)flags);
  t_put(h + 6, 2, (uint64_t)command);
  t_put(h + 8, 4, command == READ ? len : 0);
  t_put(h + 12, 4, cookie);
  t_put(h + 16, 8, off);
  t_put(h + 24, 4, len);
}

static int t_send(struct t_conn *c, int flags, int command, uint32_t cookie,
                  uint64_t off, uint32_t len, const void *data) {
  int extended = c->structured > 1;
  unsigned char h[32];
  t_head(h, flags, command, cookie, off, len);
  if (extended) {
    t_put(h, 4, 0x21e41c71);
    if (command == WRITE) h[5] |= PAYLOAD;
    t_put(h + 24, 8, len);
  }
  if (t_write(c->fd, h, extended ? 32 : 28)) return -1;
  return command == WRITE ? t_write(c->fd, data, len) : 0;
}

/* The next reply or chunk: 1, or 0 at the end of the stream */
static int t_recv(struct t_conn *c, struct t_reply *r) {
  unsigned char h[32];
  uint32_t room;
  if (t_read(c->fd, h, 16) != 16) return 0;
  r->error = 0;
  r->chunk = -1;
  r->done = 1;
  if (t_get(h, 4) == 0x67446698) {
    r->error = (uint32_t)t_get(h + 4, 4);
    r->cookie = t_get(h + 8, 8);
    r->len = r->error ? 0 : (uint32_t)(r->cookie >> 32);
    CHECK(c->structured == 0 || (c->structured == 1 && r->len == 0));
  } else {
    size_t more = c->structured > 1 ? 16 : 4;
    CHECK(c->structured > 0);
    CHECK(t_get(h, 4) == (more > 4 ? 0x6e8a278c : 0x668e33ef));
    if (t_read(c->fd, h + 16, more) != more) return 0;
    r->done = (int)t_get(h + 4, 2);
    r->chunk = (int)t_get(h + 6, 2);
    r->cookie = t_get(h + 8, 8);
    r->start = more > 4 ? t_get(h + 16, 8) : 0;
    r->len = (uint32_t)t_get(h + 12 + more, 4);
    CHECK(more == 4 || t_get(h + 24, 4) == 0);
    CHECK(r->done <= 1 && r->len <= (64u << 20) + 8);
    if (r->chunk == 1 || r->chunk == 2) {
      CHECK(r->chunk == 1 ? r->len > 8 : r->len == 12);
      if (t_read(c->fd, h, 8) != 8) return 0;
      r->off = t_get(h, 8);
      r->len -= 8;
    }
    if (r->chunk == 2) {
      if (t_read(c->fd, h, 4) != 4) return 0;
      CHECK((r->len = (uint32_t)t_get(h, 4)) > 0);
    }
  }
  room = r->len;
  if (r->room < room) {
    free(r->data);
    r->data = malloc(r->room = room);
    CHECK(r->data != NULL);
  }
  if (r->chunk == 2)
    memset(r->data, 0, room);
  else if (t_read(c->fd, r->data, room) != room)
    return 0;
  if (r->chunk == 2) r->chunk = 1;
  if (r->chunk >= 0x8001) {
    r->error = (uint32_t)t_get(r->data, 4);
    CHECK(r->error != 0);
    CHECK(t_get(r->data + 4, 2) == room - (r->chunk == 0x8001 ? 6 : 14));
  }
  CHECK(r->chunk < 0x8000 || r->error);
  return 1;
}

/* One request and its whole reply: an NBD error number, or -1 when the
 * connection has ended.  data: what is written, or room for what is read. */
static int t_do(struct t_conn *c, int flags, int command, uint64_t off,
                uint32_t len, void *data) {
  struct t_reply r = {0};
  int error = 0;
  uint32_t mine = ++c->cookie;
  if (t_send(c, flags, command, mine, off, len, data)) return -1;
  do {
    if (!t_recv(c, &r)) {
      free(r.data);
      return -1;
    }
    CHECK((uint32_t)r.cookie == mine);
    if (r.error)
      error = (int)r.error;
    else if (command == READ && r.chunk < 0 && r.len)
      memcpy(data, r.data, r.len);
    else if (command == READ && r.chunk == 1) {
      CHECK(r.off >= off && r.off + r.len <= off + len);
      memcpy((char *)data + (r.off - off), r.data, r.len);
    }
  } while (!r.done);
  free(r.data);
  return error;
}

static void t_close(struct t_conn *c) /* in order */
{
  char end;
  CHECK(t_send(c, 0, DISC, 0, 0, 0, NULL) == 0);
  CHECK(t_read(c->fd, &end, 1) == 0);
  close(c->fd);
}

/* Zeroed memory for good, on a list so that no checker takes it for lost */
static void *t_alloc(size_t n) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static void **all;
  void **p = calloc(1, n + 16);
  CHECK(p != NULL);
  pthread_mutex_lock(&lock);
  *p = all;
  all = p;
  pthread_mutex_unlock(&lock);
  return (char *)p + 16;
}

//== client unit
static void t_sleep(int ms) {
  struct timespec t;
  t.tv_sec = ms / 1000;
  t.tv_nsec = ms % 1000 * 1000000L;
  nanosleep(&t, NULL);
}

//== client unit
/* What random choices of this run follow from; the run prints it */
static unsigned t_seed(void) {
  const char *seed = getenv("SEED");
  return seed ? (unsigned)strtoul(seed, NULL, 10) : 1;
}

/* Milliseconds since some moment */
static int64_t t_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

//== client
/* Defends "broken clients: an error reply or a closed connection, bounded
 * memory and time; other clients do not notice", and for good clients that
 * every request gets its one right answer, also over a kill or a SIGTERM.
 *
 * client VERB ADDRESS...: ADDRESS is a socket's path or HOST:PORT */
#include <netdb.h>
#include <sys/un.h>

static int c_unix(const char *path, int fd,
                  int (*f)(int, const struct sockaddr *, socklen_t)) {
  struct sockaddr_un a = {0};
  a.sun_family = AF_UNIX;
  CHECK(strlen(path) < sizeof a.sun_path);
  strcpy(a.sun_path, path);
  return f(fd, (struct sockaddr *)&a, sizeof a);
}

static int c_connect(const char *address) {
  int fd;
  if (strchr(address, '/') || !strchr(address, ':')) {
    CHECK((fd = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0);
    CHECK(c_unix(address, fd, connect) == 0);
  } else {
    char host[100];
    const char *port = strrchr(address, ':');
    struct addrinfo hints = {0}, *ai;
    int n;
    CHECK(port && port - address < 99);
    if (*address == '[') address++;
    n = (int)(port - address) - (port[-1] == ']');
    snprintf(host, sizeof host, "%.*s", n, address);
    hints.ai_flags = AI_NUMERICHOST;
    hints.ai_socktype = SOCK_STREAM;
    CHECK(getaddrinfo(host, port + 1, &hints, &ai) == 0);
    CHECK((fd = socket(ai->ai_family, SOCK_STREAM, 0)) >= 0);
    CHECK(connect(fd, ai->ai_addr, ai->ai_addrlen) == 0);
    freeaddrinfo(ai);
  }
  return fd;
}

static int c_listen(const char *path) {
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  CHECK(fd >= 0 && c_unix(path, fd, bind) == 0 && listen(fd, 10) == 0);
  return fd;
}

/* A normal client: both kinds of replies; returns the size */
static uint64_t c_session(int fd, const char *name, int structured) {
  struct t_conn c;
  unsigned char b[512];
  CHECK(t_open(&c, fd, name, structured) == 0);
  if (c.size) CHECK(t_do(&c, 0, READ, 0, c.size < 512 ? 1 : 512, b) == 0);
  if (structured) CHECK(t_do(&c, REQ_ONE, STATUS, 0, 1, NULL) == 0);
  if (c.flags & 4) CHECK(t_do(&c, 0, FLUSH, 0, 0, NULL) == 0);
  t_close(&c);
  return c.size;
}

static long c_memory(const char *pid, const char *what) /* KiB */
{
  char path[100], line[200];
  long kib = -1;
  FILE *f;
  snprintf(path, sizeof path, "/proc/%s/status", pid);
  CHECK((f = fopen(path, "r")) != NULL);
  while (fgets(line, sizeof line, f))
    if (!strncmp(line, what, strlen(what))) kib = atol(line + strlen(what));
  fclose(f);
  CHECK(kib > 0);
  return kib;
}

/* Random bytes, the same for the same SEED and CALL */
static void v_noise(char **a) /* SEED CALL BYTES */
{
  uint64_t left = strtoull(a[2], NULL, 10), z;
  uint64_t state = strtoull(a[0], NULL, 10) << 32 | strtoull(a[1], NULL, 10);
  for (; left > 0; left -= left < 8 ? left : 8) { /* splitmix64 */
    z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    z ^= z >> 31;
    if (fwrite(&z, 1, left < 8 ? (size_t)left : 8, stdout) < 1) return;
  }
}

static void v_hello(char **a) /* ADDRESS [NAME] */
{
  const char *name = a[1] ? a[1] : "";
  uint64_t size = c_session(c_connect(a[0]), name, 0);
  CHECK(c_session(c_connect(a[0]), name, 1) == size);
  CHECK(c_session(c_connect(a[0]), name, 2) == size);
  printf("%llu\n", (unsigned long long)size);
}

/* ---- pipeline: every reply once, every byte right ---- */

#define SLOT 4096u

struct pipe { /* one connection; slot i of its region belongs to request i */
  struct t_conn c;
  pthread_t receiver, sender;
  unsigned n, id, phase;
  unsigned char *want; /* what the region holds */
  unsigned char *op, *undefined;
};

static unsigned p_hash(unsigned a, unsigned b, unsigned c) {
  unsigned h = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
  h ^= h >> 15;
  h *= 2654435761u;
  return h ^ h >> 13;
}

/* Chooses all requests of a phase, and what the region holds behind them */
static void p_plan(struct pipe *p) {
  static const unsigned char mixed[] = {READ,   WRITE, ZEROES, TRIM,
                                        STATUS, CACHE, READ,   WRITE};
  unsigned i, k;
  for (i = 0; i < p->n; i++) {
    unsigned char *slot = p->want + i * SLOT;
    unsigned h = p_hash(p->id + t_seed(), p->phase, i);
    p->op[i] = p->phase == 0 ? WRITE : p->phase == 2 ? READ : mixed[h % 8];
    if (p->op[i] == STATUS && !p->c.structured) p->op[i] = READ;
    if (p->op[i] == WRITE) {
      for (k = 0; k < SLOT; k++)
        slot[k] = (unsigned char)(h + k * 7);
    } else if (p->op[i] == ZEROES)
      memset(slot, 0, SLOT);
    else if (p->op[i] == TRIM)
      p->undefined[i] = 1;
  }
}

static void *p_send(void *arg) {
  struct pipe *p = arg;
  unsigned i;
  for (i = 0; i < p->n; i++) {
    int flags = p->op[i] == WRITE && i % 64 == 1 ? FUA : 0;
    CHECK(t_send(&p->c, flags, p->op[i], i, ((uint64_t)p->id * p->n + i) * SLOT,
                 SLOT, p->want + i * SLOT) == 0);
  }
  return NULL;
}

static void p_reply(struct pipe *p, const struct t_reply *r,
                    unsigned char *pending) {
  unsigned i = (uint32_t)r->cookie;
  uint64_t off = ((uint64_t)p->id * p->n + i) * SLOT;

  CHECK(i < p->n && pending[i]);
  CHECK(r->cookie >> 32 == (p->op[i] == READ ? SLOT : 0));
  CHECK(r->error == 0);
  if (p->op[i] == READ) {
    CHECK(!p->c.structured || r->chunk == 1 || r->chunk == 0);
    if (r->chunk < 0 || r->chunk == 1) {
      size_t at = r->chunk == 1 ? (size_t)(r->off - off) : 0;
      CHECK(r->chunk < 0 || (r->off >= off && at + r->len <= SLOT));
      CHECK(p->undefined[i] ||
            !memcmp(r->data, p->want + i * SLOT + at, r->len));
    }
  } else if (p->op[i] == STATUS && p->c.structured > 1)
    CHECK(r->chunk == 6 && r->len >= 24 && (r->len - 8) % 16 == 0);
  else if (p->op[i] == STATUS)
    CHECK(r->chunk == 5 && r->len >= 12 && (r->len - 4) % 8 == 0);
  CHECK(p->c.structured < 2 || r->start == off);
  if (r->done) pending[i] = 0;
}

static void *p_run(void *arg) {
  struct pipe *p = arg;
  struct t_reply r = {0};
  unsigned char *pending = t_alloc(p->n);
  for (p->phase = 0; p->phase < 3; p->phase++) {
    unsigned left = p->n;
    p_plan(p);
    memset(pending, 1, p->n);
    CHECK(pthread_create(&p->sender, NULL, p_send, p) == 0);
    while (left) {
      CHECK(t_recv(&p->c, &r));
      p_reply(p, &r, pending);
      left -= (unsigned)r.done;
    }
    pthread_join(p->sender, NULL);
  }
  CHECK(t_do(&p->c, 0, FLUSH, 0, 0, NULL) == 0);
  t_close(&p->c);
  free(r.data);
  return NULL;
}

static void v_pipeline(char **a) /* ADDRESS CONNECTIONS REQUESTS */
{
  int i, n = atoi(a[1]);
  struct pipe *p = t_alloc((size_t)n * sizeof *p);
  for (i = 0; i < n; i++) {
    p[i].n = (unsigned)atoi(a[2]);
    p[i].id = (unsigned)i;
    p[i].want = t_alloc((size_t)p[i].n * SLOT);
    p[i].op = t_alloc(p[i].n);
    p[i].undefined = t_alloc(p[i].n);
    CHECK(t_open(&p[i].c, c_connect(a[0]), "", i % 3) == 0);
  }
  for (i = 0; i < n; i++)
    CHECK(pthread_create(&p[i].receiver, NULL, p_run, &p[i]) == 0);
  for (i = 0; i < n; i++)
    pthread_join(p[i].receiver, NULL);
}

/* READs that go another way than through the batch get their answers in turn */
static void v_turns(char **a) /* ADDRESS, of 16 MiB, in memory */
{
  enum {
    N = 8,
    LEN = 65536
  };
  static unsigned char all[N * (28 + 512 + 28)];
  struct t_reply r = {0};
  struct t_conn c;
  uint32_t i;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0 && c.size == 16 << 20);
  for (i = 0; i < N; i++) {
    unsigned char *p = all + i * (28 + 512 + 28);
    t_head(p, 0, WRITE, 2 * i, 0, 512);
    t_head(p + 28 + 512, 0, READ, 2 * i + 1, (uint64_t)LEN * i, LEN);
  }
  CHECK(t_write(c.fd, all, sizeof all) == 0);
  for (i = 0; i < 2 * N; i++)
    CHECK(t_recv(&c, &r) && !r.error && (uint32_t)r.cookie == i);
  t_close(&c);
  free(r.data);
}

/* One READ at a time, while a worker is about to answer something */
static void v_lone(char **a) /* ADDRESS, of 16 MiB */
{
  enum {
    LEN = 16384
  };
  unsigned char want[LEN], head[28];
  struct t_reply r = {0};
  struct t_conn c;
  int i, j;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0 && c.size == 16 << 20);
  for (i = 0; i < LEN; i++)
    want[i] = (unsigned char)(i * 7 + i / 256);
  CHECK(t_do(&c, 0, WRITE, 0, LEN, want) == 0);
  for (i = 0; i < 5000; i++) {
    t_head(head, 0, i % 2 ? TRIM : STATUS, 1, 1 << 20, LEN); /* an error, too */
    CHECK(t_write(c.fd, head, 28) == 0);
    t_head(head, 0, FLUSH, 2, 0, 0);
    CHECK(t_write(c.fd, head, 28) == 0);
    for (j = 0; j < i % 64 * 20; j++)
      head[j % 28] ^= 1; /* a moment */
    t_head(head, 0, READ, 3, 0, LEN);
    CHECK(t_write(c.fd, head, 28) == 0);
    for (j = 0; j < 3; j++) {
      CHECK(t_recv(&c, &r));
      if ((uint32_t)r.cookie == 3)
        CHECK(!r.error && r.len == LEN && !memcmp(r.data, want, LEN));
    }
  }
  t_close(&c);
  free(r.data);
}

/* Slow flushes, a trim and a long read in flight at once: simple replies */
static void v_mixed(char **a) /* ADDRESS, of 16 MiB */
{
  enum {
    LONG = 8 << 20,
    PIECE = 65536,
    N = 14
  };
  unsigned char *want = t_alloc(LONG), *all = t_alloc(N * (28 + PIECE)), *p;
  struct t_reply r = {0};
  struct t_conn c;
  unsigned i, round, left, seen;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0 && c.size == 2 * LONG);
  for (i = 0; i < LONG; i++)
    want[i] = (unsigned char)(i * 7 + i / 256);
  for (i = 0; i < LONG; i += 1 << 20)
    CHECK(t_do(&c, 0, WRITE, i, 1 << 20, want + i) == 0);
  for (round = 0; round < 10; round++) {
    for (i = 0, p = all; i < N; i++) {
      int command = i < 8 ? WRITE : i < 12 ? FLUSH : i < 13 ? TRIM : READ;
      t_head(p, 0, command, i, command == READ ? 0 : LONG + i * PIECE,
             command == READ    ? LONG
             : command == FLUSH ? 0
                                : PIECE);
      p += 28;
      if (command != WRITE) continue;
      memset(p, (int)(round + i + 1), PIECE);
      p += PIECE;
    }
    CHECK(t_write(c.fd, all, (size_t)(p - all)) == 0);
    t_sleep((int)round * 3);
    for (left = N, seen = 0; left; left--) {
      CHECK(t_recv(&c, &r) && !r.error);
      i = (uint32_t)r.cookie;
      CHECK(i < N && !(seen >> i & 1));
      seen |= 1u << i;
      CHECK(i < 13 || (r.len == LONG && !memcmp(r.data, want, LONG)));
    }
  }
  t_close(&c);
  free(r.data);
}

/* ---- clients that misbehave ---- */

/* Stops at some point of a session: some stay, others vanish */
static void v_rude(char **a) /* ADDRESS WHERE */
{
  static const char *const where[] = {
      "silent", "greeting", "option", "payload", "request", "data", "replies"};
  int w = 0, i, k;
  while (strcmp(where[w], a[1]))
    CHECK(++w < COUNT(where));
  for (i = 0; i < 20; i++) {
    struct t_conn c;
    unsigned char b[512];
    memset(b, 0, sizeof b);
    c.fd = c_connect(a[0]);
    if (w == 1) CHECK(t_write(c.fd, b, 3) == 0);
    if (w == 2 || w == 3) {
      CHECK(t_write(c.fd, "\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\10\0\0",
                    w == 2 ? 17 : 22) == 0);
    }
    if (w >= 4) {
      CHECK(t_open(&c, c.fd, "", i & 2) == 0);
      t_put(b, 8, UINT64_C(0x2560951300000001));
      t_put(b + 24, 4, 512);
      if (w == 4) CHECK(t_write(c.fd, b, 27) == 0);
      if (w == 5) CHECK(t_write(c.fd, b, 300) == 0);
      if (w == 6)
        for (k = 0; k < 200; k++)
          if (t_send(&c, 0, k & 1 ? READ : FLUSH, 1, 0, k & 1 ? 65536 : 0, b))
            break;
    }
    if (i % 2) close(c.fd);
  }
  for (i = 0; i < 3; i++)
    c_session(c_connect(a[0]), "", i & 1);
}

static void v_stall(char **a) /* ADDRESS PID KIB [LENGTH] */
{
  struct t_conn c[8], good;
  uint32_t len = a[3] ? (uint32_t)atol(a[3]) : 65536;
  unsigned char *b = t_alloc(len);
  int i, k;
  for (i = 0; i < COUNT(c); i++) {
    CHECK(t_open(&c[i], c_connect(a[0]), "", i & 1) == 0);
    for (k = 0; k < 32; k++)
      CHECK(t_send(&c[i], 0, READ, 1, 0, 32u << 20, NULL) == 0);
  }
  t_sleep(200);
  alarm(10);
  CHECK(t_open(&good, c_connect(a[0]), "", 1) == 0);
  for (i = 0; i < 10; i++) {
    CHECK(t_do(&good, 0, READ, (uint64_t)i * 4096, len, b) == 0);
    CHECK(t_do(&good, 0, WRITE, (uint64_t)i * 4096, len, b) == 0);
  }
  t_close(&good);
  printf("VmHWM %ld KiB\n", c_memory(a[1], "VmHWM:"));
  fflush(stdout);
  CHECK(c_memory(a[1], "VmHWM:") <= atol(a[2]));
}

static void v_idle(char **a) /* ADDRESS PID */
{
  struct t_conn c;
  int silent = c_connect(a[0]);
  char b;
  CHECK(t_open(&c, c_connect(a[0]), "", 1) == 0);
  CHECK(kill(atoi(a[1]), SIGTERM) == 0);
  CHECK(t_read(c.fd, &b, 1) == 0);
  close(silent);
}

/* ---- crowds ---- */

struct guest {
  pthread_t thread;
  const char *address;
  int n;
};

static void *g_visit(void *arg) {
  struct guest *g = arg;
  struct t_conn c;
  char b[512];
  CHECK(t_open(&c, c_connect(g->address), "", g->n & 1) == 0);
  CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
  t_sleep(5);
  t_close(&c);
  return NULL;
}

static void *g_large(void *arg) {
  struct guest *g = arg;
  struct t_conn c;
  struct t_reply r = {0};
  int i, left = 3;
  CHECK(t_open(&c, c_connect(g->address), "", g->n & 1) == 0);
  for (i = 0; i < left; i++)
    CHECK(t_send(&c, 0, READ, (uint32_t)i, 0, 32u << 20, NULL) == 0);
  while (left) {
    CHECK(t_recv(&c, &r) && r.error == 0);
    left -= r.done;
  }
  t_close(&c);
  free(r.data);
  return NULL;
}

static void *g_flush(void *arg) {
  struct guest *g = arg;
  struct t_conn c;
  struct t_reply r = {0};
  char b[4096];
  uint64_t seen = 0;
  int i, left;
  memset(b, g->n, sizeof b);
  CHECK(t_open(&c, c_connect(g->address), "", g->n & 1) == 0);
  for (i = 0; i < 40; i++) { /* 40 requests in flight: write, FUA, flush */
    uint64_t off = (uint64_t)(g->n % 8 * 16 + i % 16) * 4096;
    CHECK(t_send(&c, i % 3 == 1 ? FUA : 0, i % 3 == 2 ? FLUSH : WRITE,
                 (uint32_t)i, i % 3 == 2 ? 0 : off, i % 3 == 2 ? 0 : 4096,
                 b) == 0);
  }
  for (left = 40; left; left--) {
    CHECK(t_recv(&c, &r) && r.error == 0 && r.cookie < 40);
    CHECK(!(seen >> r.cookie & 1));
    seen |= (uint64_t)1 << r.cookie;
  }
  t_close(&c);
  free(r.data);
  return NULL;
}

static void g_all(char **a, void *(*f)(void *)) {
  int i, n = atoi(a[1]);
  struct guest *g = t_alloc((size_t)n * sizeof *g);
  for (i = 0; i < n; i++) {
    g[i].address = a[0];
    g[i].n = i;
    CHECK(pthread_create(&g[i].thread, NULL, f, &g[i]) == 0);
  }
  for (i = 0; i < n; i++)
    pthread_join(g[i].thread, NULL);
  c_session(c_connect(a[0]), "", 1);
}

static void v_crowd(char **a) {
  g_all(a, g_visit);
}
static void v_large(char **a) {
  g_all(a, g_large);
}
static void v_flushes(char **a) {
  int i;
  for (i = 0; i < 5; i++)
    g_all(a, g_flush);
}

static long c_ticks(const char *pid) /* of CPU time */
{
  char path[100];
  long user = -1, kernel = -1;
  FILE *f;
  snprintf(path, sizeof path, "/proc/%s/stat", pid);
  CHECK((f = fopen(path, "r")) != NULL);
  CHECK(fscanf(f,
               "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u "
               "%ld %ld",
               &user, &kernel) == 2);
  fclose(f);
  return user + kernel;
}

static void v_spin(char **a) /* ADDRESS PID, which lacks descriptors */
{
  int i, fd[60];
  long before;
  for (i = 0; i < 60; i++)
    fd[i] = c_connect(a[0]);
  t_sleep(1000); /* for the threads of those that it can take */
  before = c_ticks(a[1]);
  t_sleep(500);
  CHECK(c_ticks(a[1]) - before < sysconf(_SC_CLK_TCK) / 5);
  for (i = 0; i < 60; i++)
    close(fd[i]);
  c_session(c_connect(a[0]), "", 1);
}

static void v_many(char **a) /* ADDRESS N */
{
  int i;
  for (i = 0; i < atoi(a[1]); i++)
    c_session(c_connect(a[0]), "", i & 1);
}

static void v_next(char **a) /* ADDRESS, which has one slot */
{
  struct t_conn c;
  int fd;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0);
  fd = c_connect(a[0]);
  t_close(&c);
  c_session(fd, "", 1);
}

static void v_limit(char **a) /* ADDRESS N */
{
  struct t_conn c[100];
  struct pollfd p;
  char b[512];
  int i, n = atoi(a[1]);
  for (i = 0; i < n; i++)
    CHECK(t_open(&c[i], c_connect(a[0]), "", 0) == 0);
  p.fd = c_connect(a[0]);
  p.events = POLLIN;
  CHECK(poll(&p, 1, 200) == 0); /* waits */
  for (i = 0; i < n; i++)
    CHECK(t_do(&c[i], 0, READ, 0, 512, b) == 0);
  t_close(&c[0]);
  c_session(p.fd, "", 0);
  close(c[1].fd);
  for (i = 0; i < 10; i++)
    c_session(c_connect(a[0]), "", 0);
}

/* A round with everything from files: whole, cut, or without reading the
 * answers */
static void p_bad_round(const char *address, char **file, int round) {
  static char b[65536];
  char **first = file;
  for (; *file; file++) {
    int in = open(*file, O_RDONLY), fd;
    size_t len = t_read(in, b, sizeof b);
    CHECK(in >= 0);
    close(in);
    fd = c_connect(address);
    if (round % 4 == 1 && len)
      len = p_hash((unsigned)round, t_seed(), (unsigned)(file - first)) %
            (unsigned)len;
    (void)t_write(fd, b, len);
    if (round % 2 == 0) {
      shutdown(fd, SHUT_WR);
      while (t_read(fd, b, sizeof b) == sizeof b)
        ;
    }
    close(fd);
  }
}

/* A server's memory grows with the clients that it has at a time, and on a busy
 * machine these may become more; but it does not grow again and again. */
static void v_badinput(char **a) /* ADDRESS PID KIB ROUNDS FILE... */
{
  int round, rounds = atoi(a[3]), i, tries;
  long before = 0, grown = 0;
  static struct t_conn c[128];
  char block[4096];
  for (i = 0; i < 128; i++) { /* as many threads as it will ever have */
    CHECK(t_open(&c[i], c_connect(a[0]), "", i & 1) == 0);
    CHECK(t_do(&c[i], 0, READ, 0, 4096, block) == 0);
  }
  for (i = 0; i < 128; i++)
    t_close(&c[i]);
  for (round = 0; round < 4; round++)
    p_bad_round(a[0], a + 4, round);
  for (tries = 0; tries < 4 && (!tries || grown > atol(a[2])); tries++) {
    before = c_memory(a[1], "VmRSS:");
    for (; round < rounds * (tries + 1); round++)
      p_bad_round(a[0], a + 4, round);
    c_session(c_connect(a[0]), "", 0);
    c_session(c_connect(a[0]), "", 1);
    t_sleep(100 * tries); /* the last clients may still be leaving */
    grown = c_memory(a[1], "VmRSS:") - before;
    printf("VmRSS from %ld to %ld KiB\n", before, before + grown);
    fflush(stdout);
  }
  CHECK(grown <= atol(a[2]));
}

static void v_compare(char **a) /* ADDRESS FILE OFFSET: what is served */
{
  static const uint32_t steps[] = {7777, 65536, 262144, 1 << 20, 3000001};
  static char b[3000001], want[3000001];
  struct t_conn c;
  int i, structured, fd = open(a[1], O_RDONLY);
  for (structured = 0; structured < 2; structured++) {
    CHECK(t_open(&c, c_connect(a[0]), "", structured) == 0);
    for (i = 0; i < COUNT(steps); i++) {
      uint64_t off, len;
      for (off = 0; off < c.size; off += len) {
        len = c.size - off < steps[i] ? c.size - off : steps[i];
        CHECK(t_do(&c, 0, READ, off, (uint32_t)len, b) == 0);
        CHECK(pread(fd, want, len, (off_t)off + atol(a[2])) == (ssize_t)len);
        CHECK(!memcmp(b, want, len));
      }
    }
    t_close(&c);
  }
}

static void v_shrunk(char **a) /* ADDRESS FILE, which is 4 MiB */
{
  static char b[4 << 20];
  struct t_conn c[2];
  int i;
  for (i = 0; i < 2; i++) {
    CHECK(t_open(&c[i], c_connect(a[0]), "", i) == 0);
    CHECK(t_do(&c[i], 0, READ, 0, 4 << 20, b) == 0);
  }
  CHECK(truncate(a[1], 5000) == 0);
  for (i = 0; i < 2; i++) {
    CHECK(t_do(&c[i], 0, READ, 1 << 20, 1 << 19, b) == 5);
    CHECK(t_do(&c[i], 0, READ, 0, 4 << 20, b) == 5);
    CHECK(t_do(&c[i], 0, READ, 0, 65536, b) == 5);
    CHECK(t_do(&c[i], 0, READ, 0, 5000, b) == 0);
    t_close(&c[i]);
  }
}

static void v_half(char **a) /* ADDRESS FILE of 8 MiB, of which 5 stay */
{
  enum {
    ALL = 8 << 20,
    LEFT = 5 << 20
  };
  static char b[ALL], want[ALL];
  static struct t_reply r;
  struct t_conn c;
  uint64_t off = 0;
  int structured, fd = open(a[1], O_RDONLY);
  CHECK(fd >= 0 && t_read(fd, want, ALL) == ALL);
  for (structured = 0; structured < 3; structured++) {
    CHECK(t_open(&c, c_connect(a[0]), "", structured) == 0 && c.size == ALL);
    CHECK(truncate(a[1], LEFT) == 0);
    CHECK(t_do(&c, 0, READ, 0, ALL, b) == 5);
    if (structured) {
      off = 0;
      CHECK(t_send(&c, 0, READ, 1, 0, ALL, NULL) == 0);
      while (CHECK(t_recv(&c, &r)), !r.done) { /* chunks of what is there */
        CHECK(r.chunk == 1 && r.off == off && off + r.len <= LEFT);
        CHECK(!memcmp(r.data, want + off, r.len));
        off += r.len;
      }
      CHECK(off > 0 && r.chunk == 0x8002 && r.error == 5);
      CHECK(t_get(r.data + r.len - 8, 8) == off);
    }
    CHECK(t_do(&c, 0, READ, 0, LEFT, b) == 0 && !memcmp(b, want, LEFT));
    t_close(&c);
    CHECK(truncate(a[1], ALL) == 0);
  }
}

/* Neither data nor zeroes are there where a file has been cut off */
static void v_lost(char **a) /* ADDRESS FILE of 1 MiB, of which 64 KiB stay */
{
  enum {
    ALL = 1 << 20,
    LEFT = 65536
  };
  static const uint32_t from[] = {0, 4096, LEFT, ALL / 2, ALL - 512};
  static struct t_reply r;
  struct t_conn c;
  char b[4096];
  unsigned i, k, n;
  CHECK(t_open(&c, c_connect(a[0]), "", 1) == 0 && c.size == ALL);
  CHECK(truncate(a[1], LEFT) == 0);
  CHECK(t_do(&c, 0, READ, ALL / 2, 4096, b) == 5);
  CHECK(t_do(&c, 0, READ, LEFT, 512, b) == 5);
  for (i = 0; i < 2 * (unsigned)COUNT(from); i++) {
    uint64_t off = from[i / 2], len = i % 2 ? ALL - off : 512;
    CHECK(t_send(&c, 0, STATUS, 1, off, (uint32_t)len, NULL) == 0);
    CHECK(t_recv(&c, &r) && r.chunk == 5 && r.done && r.len >= 12);
    n = r.len / 8;
    for (k = 0; k < n; k++) {
      off += t_get(r.data + 4 + 8 * k, 4);
      CHECK(off <= LEFT || t_get(r.data + 8 + 8 * k, 4) == 0);
    }
    CHECK(off > LEFT || i < 4);
  }
  t_close(&c);
}

/* ---- acked: what was acknowledged is in the file ---- */

enum {
  BLOCKS = 64,
  WORDS = 512
};
static uint64_t a_sent[BLOCKS], a_acked[BLOCKS], a_words[WORDS];

static int a_put(struct t_conn *c, int i, int flags) {
  int k;
  a_sent[i]++;
  for (k = 0; k < WORDS; k++)
    a_words[k] = (uint64_t)i << 32 | a_sent[i];
  return t_send(c, flags, WRITE, (uint32_t)i, (uint64_t)i * 4096, 4096,
                a_words);
}

static void v_acked(char **a) /* ADDRESS FILE PID SIGNAL AFTER [fua] */
{
  struct t_conn c;
  static struct t_reply r;
  long n = 0, after = atol(a[4]);
  int i, k, fd, gone = 0, flags = a[5] ? FUA : 0;

  CHECK(t_open(&c, c_connect(a[0]), "", 1) == 0);
  for (i = 0; i < BLOCKS; i++)
    CHECK(a_put(&c, i, flags) == 0);
  while (t_recv(&c, &r)) {        /* always one per block in flight */
    if (r.error == 108) continue; /* ESHUTDOWN */
    CHECK(r.error == 0 && r.cookie < BLOCKS);
    i = (int)r.cookie;
    a_acked[i] = a_sent[i];
    if (++n == after) CHECK(kill(atoi(a[2]), atoi(a[3])) == 0);
    if (!gone) gone = a_put(&c, i, flags);
  }
  CHECK(n >= after);
  CHECK((fd = open(a[1], O_RDONLY)) >= 0);
  for (i = 0; i < BLOCKS; i++) {
    CHECK(t_read(fd, a_words, 4096) == 4096);
    for (k = 0; k < WORDS; k++) {
      uint64_t seq = a_words[k] & 0xffffffff;
      CHECK(seq == 0 || a_words[k] >> 32 == (uint64_t)i);
      CHECK(seq >= a_acked[i] && seq <= a_sent[i]);
    }
  }
}

static void v_each(char **a) /* ADDRESS PREFIX NUMBER */
{
  int n = atoi(a[2]), i, round;
  unsigned char b[4096];
  for (round = 0; round < 2; round++)
    for (i = 1; i <= n; i++) {
      struct t_conn c;
      char name[100];
      snprintf(name, sizeof name, "%s%d", a[1], i);
      CHECK(t_open(&c, c_connect(a[0]), name, 1) == 0);
      if (round) {
        CHECK(t_do(&c, 0, READ, 8192, 4096, b) == 0);
        CHECK(b[0] == i % 251 && b[1] == i / 251 && b[4095] == i % 251);
      } else {
        memset(b, i % 251, sizeof b);
        b[1] = (unsigned char)(i / 251);
        CHECK(t_do(&c, 0, WRITE, 8192, 4096, b) == 0);
        CHECK(t_do(&c, 0, FLUSH, 0, 0, NULL) == 0);
      }
      t_close(&c);
    }
}

/* ---- kills: what was acknowledged outlives kill -9 of the server ---- */

enum {
  K_BLOCK = 4096,
  K_SIZE = (4 << 20) + 777, /* its last block is an odd one */
  K_DEPTH = 16,
  K_MOST = 65536, /* bytes of a write */
  K_READ = 16384, /* of a read: replies to all fit into the socket */
  K_SNAPSHOTS = 16
};

/* A request that is not known to be done; len 0: none.  A TRIM that has been
 * answered goes on as a READ of what it left. */
struct k_request {
  int command, flags, trimmed, conn;
  uint32_t len;
  uint64_t off;
  unsigned char data[K_MOST]; /* what it writes */
};

static struct kills {
  char **a; /* ADDRESS KILLS STORE PROGRAM ARG... */
  pid_t server;
  struct t_conn c[2];
  int conns;
  struct k_request r[K_DEPTH];
  uint64_t state; /* of k_random */
  long acknowledged, again, kills;
  int flushing;                 /* is a FLUSH under way? */
  int mostly;                   /* the command of most requests */
  unsigned char shadow[K_SIZE]; /* all that was acknowledged */
  unsigned char image[K_SIZE];
  unsigned char *snapshot[K_SNAPSHOTS]; /* what it held when it was new */
  int snapshots;
} k;

static unsigned k_random(unsigned n) /* 0 to n - 1; splitmix64 */
{
  uint64_t z = k.state += UINT64_C(0x9e3779b97f4a7c15);
  z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
  return (unsigned)((z ^ z >> 31) >> 33) % n;
}

static void k_pause(unsigned us) {
  struct timespec t = {0, 0};
  t.tv_nsec = (long)us * 1000;
  nanosleep(&t, NULL);
}

static int k_overlaps(const struct k_request *r, uint64_t off, uint64_t len) {
  return r->len && r->off < off + len && off < r->off + r->len;
}

/* In how many blocks is `got` (what was read at off) neither what was
 * acknowledged nor, as far as one reaches, what a request without a reply
 * writes?  Of each block such a request writes all or nothing. */
static int k_wrong(const unsigned char *got, uint64_t off, uint32_t len) {
  unsigned char b[K_BLOCK];
  uint64_t from, to, end = off + len;
  int i, wrong = 0;
  for (from = off; from < end; from = to) {
    to = from / K_BLOCK * K_BLOCK + K_BLOCK;
    if (to > end) to = end;
    memcpy(b, got + (from - off), to - from);
    for (i = 0; i < K_DEPTH; i++) {
      const struct k_request *r = &k.r[i];
      uint64_t lo = r->off > from ? r->off : from;
      uint64_t hi = r->off + r->len < to ? r->off + r->len : to;
      if (!k_overlaps(r, from, to - from) || r->command == READ) continue;
      if (!memcmp(b + (lo - from), r->data + (lo - r->off), hi - lo))
        memcpy(b + (lo - from), k.shadow + lo, hi - lo);
    }
    wrong += memcmp(b, k.shadow + from, to - from) != 0;
  }
  return wrong;
}

static void k_image(struct t_conn *c, unsigned char *image) {
  uint32_t off, len;
  CHECK(c->size == K_SIZE);
  for (off = 0; off < K_SIZE; off += len) {
    len = K_SIZE - off < 65536 ? K_SIZE - off : 65536;
    CHECK(t_do(c, 0, READ, off, len, image + off) == 0);
  }
}

static pid_t k_spawn(char **a) {
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    CHECK(freopen("/dev/null", "w", stdout) != NULL);
    execv(a[0], a);
    _exit(126);
  }
  return pid;
}

static void k_kill(void) {
  CHECK(kill(k.server, SIGKILL) == 0);
  CHECK(waitpid(k.server, NULL, 0) == k.server);
  k.kills++;
}

/* A connection to the server, which may need a while to listen */
static int k_connect(struct t_conn *c, const char *name) {
  int i, fd;
  for (i = 0; i < 10000; i++) {
    CHECK((fd = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0);
    if (c_unix(k.a[0], fd, connect) == 0) return t_open(c, fd, name, 1);
    close(fd);
    CHECK(waitpid(k.server, NULL, WNOHANG) == 0); /* it has to start */
    k_pause(1000);
  }
  errno = ETIMEDOUT;
  return -1;
}

/* The server, now and then the second after one that was killed at once */
static void k_start(void) {
  int i;
  k.server = k_spawn(k.a + 3);
  if (k_random(4) == 0) {
    k_pause(k_random(8000));
    k_kill();
    k.server = k_spawn(k.a + 3);
  }
  k.conns = 1;
  for (i = 0; i < k.conns; i++) {
    CHECK(k_connect(&k.c[i], "v") == 0);
    if (k.c[0].flags & 0x100) k.conns = 2; /* CAN_MULTI_CONN */
  }
}

static int k_send(struct k_request *r) {
  int command = r->trimmed ? READ : r->command;
  struct t_conn *c = &k.c[r->conn % k.conns];
  return t_send(c, r->flags, command, (uint32_t)(r - k.r), r->off, r->len,
                r->data);
}

/* What to write: something new, the same block again and again, what stands in
 * another place, or zeroes */
static void k_data(struct k_request *r) {
  uint32_t i, from = k_random((K_SIZE - K_MOST) / K_BLOCK) * K_BLOCK;
  unsigned kind = k_random(8), x = k_random(5);
  if (kind < 3)
    for (i = 0; i < r->len; i++)
      r->data[i] = (unsigned char)k_random(256);
  else if (kind < 5)
    for (i = 0; i < r->len; i++)
      r->data[i] = (unsigned char)(x + (r->off + i) % K_BLOCK / 16);
  else if (kind < 7)
    memcpy(r->data, k.shadow + from, r->len);
  else
    memset(r->data, 0, r->len);
}

/* A new request that meets no other one, unless it writes just the same */
static void k_choose(struct k_request *r) {
  static const int commands[] = {WRITE, WRITE, WRITE, WRITE,  WRITE,
                                 WRITE, WRITE, TRIM,  ZEROES, READ};
  const struct k_request *twin = &k.r[k_random(K_DEPTH)];
  uint32_t len, off;
  int i, whole = k_random(3) > 0;
  r->command = k_random(4) ? k.mostly : commands[k_random(COUNT(commands))];
  r->flags = r->command != READ && k_random(1000) == 0 ? FUA : 0;
  r->trimmed = 0;
  r->conn = (int)k_random(2);
  if (twin->len && twin->command == WRITE && k_random(8) == 0) {
    *r = *twin;
    r->conn ^= 1;
    return;
  }
  len = 1 + k_random(k_random(10) ? 4 * K_BLOCK : K_MOST);
  if (r->command == READ && len > K_READ) len = K_READ;
  off = k_random(K_SIZE);
  if (whole) off = off / K_BLOCK * K_BLOCK;
  if (whole) len = (len + K_BLOCK - 1) / K_BLOCK * K_BLOCK;
  if (len > K_SIZE - off) len = K_SIZE - off;
  for (i = 0; i < K_DEPTH; i++)
    if (k_overlaps(&k.r[i], off, len)) return;
  r->off = off;
  r->len = len;
  if (r->command == WRITE)
    k_data(r);
  else
    memset(r->data, 0, r->len);
}

/* A reply is there, so r is done: what it did has to last */
static void k_done(struct k_request *r, const struct t_reply *reply) {
  k.acknowledged++;
  if (reply->error)
    fprintf(stderr, "command %d: error %u\n", r->command, reply->error);
  CHECK(reply->error == 0);
  if (r->command == TRIM && !r->trimmed) {
    r->trimmed = 1;
    r->flags = 0;
    return;
  }
  if (r->command != READ && !r->trimmed)
    memcpy(k.shadow + r->off, r->data, r->len);
  if (r->trimmed) memcpy(k.shadow + r->off, k.image + r->off, r->len);
  r->len = 0;
}

/* Takes one reply, a READ's in its chunks; 0 at the end of the stream */
static int k_take(struct t_conn *c) {
  static struct t_reply reply;
  struct k_request *r;
  do {
    if (!t_recv(c, &reply)) return 0;
    CHECK((uint32_t)reply.cookie <= K_DEPTH);
    if ((uint32_t)reply.cookie == K_DEPTH) { /* a flush */
      CHECK(reply.error == 0 && k.flushing);
      return k.flushing = 0, 1;
    }
    r = &k.r[(uint32_t)reply.cookie];
    CHECK(r->len && &k.c[r->conn % k.conns] == c);
    if (reply.chunk != 1) continue;
    CHECK(reply.off >= r->off && reply.off + reply.len <= r->off + r->len);
    memcpy(k.image + reply.off, reply.data, reply.len);
  } while (!reply.done);
  if (r->command == READ || r->trimmed)
    CHECK(k_wrong(k.image + r->off, r->off, r->len) == 0);
  k_done(r, &reply);
  return 1;
}

/* Sends and takes replies for so many ms; then, at the end, takes them all */
static void k_work(int ms, int end) {
  static const int mostly[] = {WRITE, WRITE, WRITE, TRIM, ZEROES};
  int64_t until = t_now() + ms;
  k.mostly = mostly[k_random(COUNT(mostly))];
  for (;;) {
    struct pollfd p[2];
    int i, busy = k.flushing, more = t_now() < until;
    for (i = 0; i < K_DEPTH; i++) {
      struct k_request *r = &k.r[i];
      int fresh = !r->len;
      if (fresh && more) k_choose(r);
      if (r->len && (fresh || r->trimmed == 1)) CHECK(k_send(r) == 0);
      if (r->trimmed) r->trimmed = 2;
      busy += r->len > 0;
    }
    if (!more && !(end && busy)) return;
    if (more && !k.flushing && k_random(500) == 0) {
      CHECK(t_send(&k.c[0], 0, FLUSH, K_DEPTH, 0, 0, NULL) == 0);
      k.flushing = 1;
    }
    for (i = 0; i < k.conns; i++) {
      p[i].fd = k.c[i].fd;
      p[i].events = POLLIN;
    }
    CHECK(poll(p, (nfds_t)k.conns, 1000) >= 0);
    for (i = 0; i < k.conns; i++)
      if (p[i].revents) CHECK(k_take(&k.c[i]));
  }
}

/* The newest snapshot holds what had been acknowledged before the command */
static void k_check_snapshot(int must) {
  struct t_conn c;
  char name[20];
  unsigned char *got = t_alloc(K_SIZE);
  snprintf(name, sizeof name, "v@s%d", k.snapshots);
  if (k_connect(&c, name)) {
    CHECK(!must);
    close(c.fd);
    return;
  }
  k_image(&c, got);
  t_close(&c);
  CHECK(k_wrong(got, 0, K_SIZE) == 0);
  k.snapshot[k.snapshots++] = got;
}

/* Takes a snapshot while requests are under way; their replies are left where
 * they are, so what was acknowledged stays the same.  Is the server killed? */
static int k_take_snapshot(void) {
  char name[4200], *a[] = {k.a[3], (char *)"snapshot", name, NULL};
  int status, killed = k_random(2) > 0;
  pid_t pid;
  snprintf(name, sizeof name, "%s::v@s%d", k.a[2], k.snapshots);
  pid = k_spawn(a);
  if (killed) {
    k_pause(k_random(6000));
    k_kill();
  }
  CHECK(waitpid(pid, &status, 0) == pid && (killed || status == 0));
  if (killed) return status == 0 ? 2 : 1;
  k_check_snapshot(1);
  return 0;
}

/* The server is there again.  What it had answered is still to be read; then
 * it has to know all of it, and gets the rest once more. */
static void k_again(struct t_conn old[2], int conns) {
  struct t_conn live[2];
  int i, wrong;
  memcpy(live, k.c, sizeof live);
  memcpy(k.c, old, sizeof live);
  i = k.conns, k.conns = conns, conns = i;
  for (i = 0; i < k.conns; i++) {
    while (k_take(&k.c[i]))
      ;
    close(k.c[i].fd);
  }
  memcpy(k.c, live, sizeof live);
  k.conns = conns;
  k.flushing = 0;
  k_image(&k.c[0], k.image);
  wrong = k_wrong(k.image, 0, K_SIZE);
  if (wrong)
    fprintf(stderr,
            "kill %ld: %d of %d blocks are not what was acknowledged (%ld "
            "acknowledged)\n",
            k.kills, wrong, K_SIZE / K_BLOCK + 1, k.acknowledged);
  CHECK(wrong == 0);
  for (i = 0; i < K_DEPTH; i++)
    if (k.r[i].len) {
      k.again++;
      CHECK(k_send(&k.r[i]) == 0);
      if (k.r[i].trimmed) k.r[i].trimmed = 2;
    }
}

static void k_check_all(void) {
  struct t_conn c;
  char name[20];
  int i;
  k_image(&k.c[0], k.image);
  CHECK(memcmp(k.image, k.shadow, K_SIZE) == 0);
  for (i = 0; i < k.snapshots; i++) {
    snprintf(name, sizeof name, "v@s%d", i);
    CHECK(k_connect(&c, name) == 0);
    k_image(&c, k.image);
    t_close(&c);
    CHECK(memcmp(k.image, k.snapshot[i], K_SIZE) == 0);
  }
}

/* Writes to the export "v", zeroes so far, of a server that it starts, kills so
 * many times and starts again; takes snapshots if there is a STORE.  Checks all
 * that was acknowledged after each kill. */
static void v_kills(char **a) /* ADDRESS KILLS STORE PROGRAM ARG... */
{
  int i, n = 0, conns, status, taken;
  struct t_conn old[2];
  k.a = a;
  k.state = t_seed();
  k_start();
  while (k.kills < atoi(a[1])) {
    unsigned ms = k_random(12);
    k_work((int)(ms * ms), 0);
    taken = 0;
    if (*a[2] && ++n % 3 == 0 && k.snapshots < K_SNAPSHOTS)
      taken = k_take_snapshot();
    if (!taken) k_kill();
    memcpy(old, k.c, sizeof old);
    conns = k.conns;
    k_start();
    if (taken) k_check_snapshot(taken == 2);
    k_again(old, conns);
  }
  k_work(20, 1);
  for (n = 0; n < 2; n++) { /* as it is, and after an end in order */
    k_check_all();
    for (i = 0; i < k.conns; i++)
      t_close(&k.c[i]);
    CHECK(kill(k.server, SIGTERM) == 0);
    CHECK(waitpid(k.server, &status, 0) == k.server && status == 0);
    if (n == 0) k_start();
  }
  printf("%ld kills, %ld replies, %ld requests sent again, %d snapshots\n",
         k.kills, k.acknowledged, k.again, k.snapshots);
}

/* ---- brim: a volume on a disk that is full ---- */

static struct brim {
  struct t_conn c;
  int shadow;   /* a file: all that was acknowledged, up to top */
  uint64_t top; /* only holes lie behind it */
  long refused; /* requests that got ENOSPC */
} brim;

/* What was acknowledged there */
static void b_shadow(uint64_t off, uint32_t len, unsigned char *b) {
  ssize_t n = pread(brim.shadow, b, len, (off_t)off);
  CHECK(n >= 0);
  memset(b + n, 0, len - (size_t)n);
}

/* A request that may have been done in part, or not at all: each block holds
 * what it did or what the request writes, and from now on that */
static void b_settle(uint64_t off, uint32_t len, const unsigned char *data) {
  static unsigned char got[K_MOST], had[K_MOST];
  uint32_t at, n;
  CHECK(t_do(&brim.c, 0, READ, off, len, got) == 0);
  b_shadow(off, len, had);
  for (at = 0; at < len; at += n) {
    n = K_BLOCK - (uint32_t)((off + at) % K_BLOCK);
    if (n > len - at) n = len - at;
    CHECK(!memcmp(got + at, had + at, n) || !memcmp(got + at, data + at, n));
  }
  if (memcmp(got, had, len))
    CHECK(pwrite(brim.shadow, got, len, (off_t)off) == (ssize_t)len);
}

/* One request; a WRITE is of blocks that are nowhere else.  ENOSPC is the only
 * error there is, and only if `full`.  Is it done? */
static int b_do(int command, uint64_t off, uint32_t len, int full) {
  static unsigned char data[K_MOST];
  uint32_t i;
  int error;
  memset(data, 0, len);
  if (command == WRITE)
    for (i = 0; i < len; i++)
      data[i] = (unsigned char)(i % 512 < 8 ? k_random(256) : i);
  error = t_do(&brim.c, 0, command, off, len, data);
  if (error && !(error == 28 && full))
    fprintf(stderr, "command %d at %llu, %lu bytes: error %d\n", command,
            (unsigned long long)off, (unsigned long)len, error);
  CHECK(error == 0 || (error == 28 && full));
  if (error || command == TRIM)
    b_settle(off, len, data);
  else
    CHECK(pwrite(brim.shadow, data, len, (off_t)off) == (ssize_t)len);
  brim.refused += error != 0;
  if (error == 0 && off + len > brim.top) brim.top = off + len;
  return error == 0;
}

/* Writes on behind the top, in ever smaller pieces, until none fits */
static void b_fill(void) {
  uint32_t len = K_MOST;
  int refused = 0;
  while (refused < 20) {
    CHECK(brim.top + K_MOST <= brim.c.size);
    if (b_do(WRITE, brim.top, len, 1)) continue;
    if (len > K_BLOCK)
      len /= 2;
    else
      refused++;
  }
}

static void b_some(int command, int n, int full) {
  while (n-- > 0) {
    uint32_t len = 1 + k_random(4 * K_BLOCK);
    uint64_t off = (uint64_t)k_random((unsigned)(brim.top / 512)) * 512;
    if (k_random(3)) off -= off % K_BLOCK, len = (len / K_BLOCK + 1) * K_BLOCK;
    if (off + len <= brim.top) b_do(command, off, len, full);
  }
}

static void b_check(void) {
  static unsigned char got[K_MOST], want[K_MOST];
  uint64_t off;
  uint32_t len;
  for (off = 0; off < brim.c.size; off += len) {
    len = brim.c.size - off < K_MOST ? (uint32_t)(brim.c.size - off) : K_MOST;
    CHECK(t_do(&brim.c, 0, READ, off, len, got) == 0);
    b_shadow(off, len, want);
    if (memcmp(got, want, len))
      fprintf(stderr, "not what was acknowledged: %llu\n",
              (unsigned long long)off);
    CHECK(!memcmp(got, want, len));
  }
}

/* Steps: fill, flush, check; so many WRITEs of 64 KiB behind the top (add);
 * so many requests below it, where the disk is full (over, trim, zero) and
 * where there is room (must) */
static void v_brim(char **a) /* ADDRESS NAME SHADOW STEP... */
{
  CHECK((brim.shadow = open(a[2], O_RDWR | O_CREAT, 0600)) >= 0);
  CHECK((brim.top = (uint64_t)lseek(brim.shadow, 0, SEEK_END)) < 1u << 30);
  CHECK(t_open(&brim.c, c_connect(a[0]), a[1], 1) == 0);
  k.state = (uint64_t)t_now() << 16 ^ t_seed();
  for (a += 3; *a; a++) {
    const char *number = strchr(*a, ':');
    int n = number ? atoi(number + 1) : 0;
    fprintf(stderr, "%s\n", *a);
    switch (**a) {
    case 'a':
      while (n-- > 0)
        b_do(WRITE, brim.top, K_MOST, 0);
      break;
    case 'f':
      if ((*a)[1] == 'i') b_fill();
      CHECK(t_do(&brim.c, 0, FLUSH, 0, 0, NULL) == 0);
      break;
    case 'o':
      b_some(WRITE, n, 1);
      break;
    case 'm':
      b_some(WRITE, n, 0);
      break;
    case 't':
      b_some(TRIM, n, 0);
      break;
    case 'z':
      b_some(ZEROES, n, 1);
      break;
    default:
      b_check();
    }
  }
  t_close(&brim.c);
  fprintf(stderr, "%llu bytes, %ld requests refused\n",
          (unsigned long long)brim.top, brim.refused);
}

/* ---- a store that is being mended ---- */

/* Looks at the blocks of a snapshot again and again, until none is damaged: EIO
 * or, unless reads are checked, a bit that is wrong; else each is what it was.
 * Meanwhile blocks of the volume are written, anywhere, and read. */
static void v_mended(char **a) /* ADDRESS VOLUME SNAP FILE SHADOW CHECKED */
{
  unsigned char got[K_BLOCK], want[K_BLOCK];
  int was = open(a[3], O_RDONLY), shadow = open(a[4], O_RDWR);
  int64_t from = t_now();
  struct t_conn v, snap;
  off_t at;
  int i, bad;
  CHECK(was >= 0 && shadow >= 0);
  CHECK(t_open(&v, c_connect(a[0]), a[1], 1) == 0);
  CHECK(t_open(&snap, c_connect(a[0]), a[2], 1) == 0);
  k.state = (uint64_t)t_now() << 16 ^ t_seed();
  do {
    bad = 0;
    for (at = 0; (at = lseek(was, at, SEEK_DATA)) >= 0; at += K_BLOCK) {
      uint64_t off = k_random((unsigned)(v.size / K_BLOCK)) * K_BLOCK;
      int error = t_do(&snap, 0, READ, (uint64_t)at, K_BLOCK, got);
      int wrong = 0;
      CHECK(pread(was, want, K_BLOCK, at) == K_BLOCK);
      for (i = 0; !error && i < K_BLOCK; i++)
        wrong += got[i] != want[i];
      CHECK(error == 0 || error == 5);
      CHECK(!wrong || (wrong == 1 && !atoi(a[5])));
      bad += error || wrong;
      if (k_random(8)) continue;
      for (i = 0; i < K_BLOCK; i++)
        want[i] = (unsigned char)k_random(256);
      CHECK(t_do(&v, 0, WRITE, off, K_BLOCK, want) == 0);
      CHECK(pwrite(shadow, want, K_BLOCK, (off_t)off) == K_BLOCK);
      if (!k_random(16)) CHECK(t_do(&v, 0, FLUSH, 0, 0, NULL) == 0);
      CHECK(t_do(&v, 0, READ, off, K_BLOCK, got) == 0);
      CHECK(!memcmp(got, want, K_BLOCK));
    }
    fprintf(stderr, "%d damaged\n", bad);
    CHECK(t_now() - from < 60000);
  } while (bad);
  t_close(&v);
  t_close(&snap);
}

/* ---- a server that is given its socket ---- */

static void c_given(int server, int client, int activation, char **a) {
  pid_t pid = fork();
  int status;
  CHECK(pid >= 0);
  if (pid == 0) {
    char number[30];
    close(client);
    if (server != 3) CHECK(dup2(server, 3) == 3 && close(server) == 0);
    snprintf(number, sizeof number, "%ld", (long)getpid());
    if (activation) {
      setenv("LISTEN_PID", number, 1);
      setenv("LISTEN_FDS", "1", 1);
    }
    execv(a[0], a);
    _exit(126);
  }
  close(server);
  c_session(client, "", 1);
  if (activation >= 0) kill(pid, SIGTERM);
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

static void v_pair(char **a) /* PROGRAM ARG... */
{
  int fd[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
  c_given(fd[0], fd[1], -1, a);
}

static void v_listener(char **a) /* ADDRESS PROGRAM ARG... */
{
  int fd = c_listen(a[0]);
  c_given(fd, c_connect(a[0]), 0, a + 1);
}

/* A program that wants the address of someone whose backlog is full: it has to
 * fail soon, with status 1 */
static void v_full(char **a) /* ADDRESS PROGRAM ARG... */
{
  int fd = c_listen(a[0]), i, status;
  pid_t pid, done;
  CHECK(listen(fd, 0) == 0);
  do {
    CHECK((fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0)) >= 0);
    CHECK(fd < 100);
  } while (c_unix(a[0], fd, connect) == 0);
  CHECK(errno == EAGAIN);
  CHECK((pid = fork()) >= 0);
  if (pid == 0) {
    execv(a[1], a + 1);
    _exit(126);
  }
  for (i = 0; (done = waitpid(pid, &status, WNOHANG)) == 0 && i < 200; i++)
    t_sleep(50);
  if (!done) kill(pid, SIGKILL);
  CHECK(done == pid && WIFEXITED(status) && WEXITSTATUS(status) == 1);
}

/* A client that leaves in order, as far as it can without closing */
static void c_disc(struct t_conn *c, const char *address) {
  char b;
  CHECK(t_open(c, c_connect(address), "", 0) == 0);
  CHECK(t_send(c, 0, DISC, 0, 0, 0, NULL) == 0);
  CHECK(t_read(c->fd, &b, 1) == 0);
}

/* Of a server with one slot and --stall 1: who has sent half a request, and who
 * has left in order without closing, holds nobody's place, nor the end up.
 * Each of these took the server another 5 s. */
static void v_slots(char **a) /* HOST:PORT PID */
{
  struct t_conn halfway, gone, last;
  pid_t pid = (pid_t)atoi(a[1]);
  unsigned char h[28];
  int64_t from = t_now();
  t_head(h, 0, READ, 1, 0, 512);
  CHECK(t_open(&halfway, c_connect(a[0]), "", 0) == 0);
  CHECK(t_write(halfway.fd, h, 14) == 0);
  c_session(c_connect(a[0]), "", 0);
  CHECK(t_now() - from >= 900 && t_now() - from < 4000);
  from = t_now();
  c_disc(&gone, a[0]);
  c_session(c_connect(a[0]), "", 0);
  CHECK(t_now() - from < 2500);
  c_disc(&last, a[0]);
  from = t_now();
  CHECK(kill(pid, SIGTERM) == 0);
  while (kill(pid, 0) == 0 && t_now() - from < 2500)
    t_sleep(5);
  CHECK(t_now() - from < 2500);
}

static void v_activate(char **a) /* ADDRESS PROGRAM ARG... */
{
  int fd = c_listen(a[0]);
  c_given(fd, c_connect(a[0]), 1, a + 1);
}

/* A client that is there for a while and leaves in order */
static void v_stay(char **a) /* ADDRESS MS */
{
  struct t_conn c;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0);
  t_sleep(atoi(a[1]));
  t_close(&c);
}

/* Takes n replies to READs of 64 KiB, slowly, then the end of the stream in
 * order: not a reset, which would throw away what had been sent.  Sends up to
 * `more` requests meanwhile, which need not be answered. */
static void c_take(struct t_conn *c, int n, int more) {
  static char b[16 + 65536];
  char seen[100] = "";
  size_t got;
  int i, sent = 0;
  for (i = 0; i <= n + more; i++) {
    uint32_t cookie;
    if (i % 8 == 0) t_sleep(20);
    if (i % 8 == 0 && sent < more)
      CHECK(t_send(c, 0, READ, (uint32_t)(90 + sent++), 0, 65536, NULL) == 0);
    errno = 0;
    got = t_read(c->fd, b, sizeof b);
    if (!got && i >= n) break;
    CHECK(got == sizeof b);
    CHECK(t_get((unsigned char *)b, 8) == UINT64_C(0x6744669800000000));
    cookie = (uint32_t)t_get((unsigned char *)b + 12, 4);
    CHECK(cookie < 100 && !seen[cookie]++);
  }
  CHECK(i <= n + more && errno == 0);
}

/* TERM comes to the server when it has answered one of 64 requests, and more
 * come: all 64 were sent before it and are answered */
static void v_term(char **a) /* ADDRESS PID */
{
  static char first[16 + 65536];
  unsigned char all[64 * 28];
  struct t_conn c;
  int i;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0);
  for (i = 0; i < 64; i++)
    t_head(all + 28 * i, 0, READ, (uint32_t)i, 0, 65536);
  CHECK(t_write(c.fd, all, sizeof all) == 0); /* one segment */
  CHECK(t_read(c.fd, first, sizeof first) == sizeof first);
  CHECK(kill(atoi(a[1]), SIGTERM) == 0);
  c_take(&c, 63, 8);
  close(c.fd);
}

/* What is no request ends the connection, after the answers to what was one */
static void v_magic(char **a) /* ADDRESS */
{
  static const char junk[5000] = "GET / HTTP/1.1\r\n";
  struct t_conn c;
  int i;
  CHECK(t_open(&c, c_connect(a[0]), "", 0) == 0);
  for (i = 0; i < 30; i++)
    CHECK(t_send(&c, 0, READ, (uint32_t)i, 0, 65536, NULL) == 0);
  CHECK(t_write(c.fd, junk, 100) == 0);
  t_sleep(100); /* it is answering, and will not look at the rest */
  CHECK(t_write(c.fd, junk, sizeof junk) == 0);
  c_take(&c, 30, 0);
  close(c.fd);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*run)(char **);
  } verbs[] = {
      {"hello", v_hello},   {"pipeline", v_pipeline}, {"badinput", v_badinput},
      {"rude", v_rude},     {"stall", v_stall},       {"idle", v_idle},
      {"crowd", v_crowd},   {"large", v_large},       {"flushes", v_flushes},
      {"many", v_many},     {"limit", v_limit},       {"acked", v_acked},
      {"pair", v_pair},     {"listener", v_listener}, {"activate", v_activate},
      {"shrunk", v_shrunk}, {"compare", v_compare},   {"spin", v_spin},
      {"mixed", v_mixed},   {"lone", v_lone},         {"turns", v_turns},
      {"next", v_next},     {"half", v_half},         {"lost", v_lost},
      {"full", v_full},     {"each", v_each},         {"noise", v_noise},
      {"slots", v_slots},   {"stay", v_stay},         {"term", v_term},
      {"magic", v_magic},   {"kills", v_kills},       {"brim", v_brim},
      {"mended", v_mended},
  };
  int i;
  CHECK(argc > 2);
  alarm(100);
  for (i = 0; i < COUNT(verbs); i++)
    if (!strcmp(argv[1], verbs[i].name)) {
      verbs[i].run(argv + 2);
      return 0;
    }
  return 2;
}

//== unit fault
#define NBDSERVE_NO_MAIN 1
#include "nbdserve.h"

struct served { /* one client of a server, over a socket pair */
  struct nbdserve *s;
  pthread_t thread;
  int fd, result;
  const char *name;
};

/* A flag between threads: its value, after setting it unless value is -1 */
static int t_hold(int *flag, int value) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&lock);
  if (value < 0) value = *flag;
  *flag = value;
  pthread_mutex_unlock(&lock);
  return value;
}

static void *s_run(void *arg); /* behind #include "nbdserve.c" */

static void s_start(struct served *v, struct nbdserve *s, struct t_conn *c) {
  int fd[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
  v->s = s;
  v->fd = fd[0];
  memset(c, 0, sizeof *c);
  c->fd = fd[1];
  CHECK(pthread_create(&v->thread, NULL, s_run, v) == 0);
}

static int s_end(struct served *v) {
  pthread_join(v->thread, NULL);
  return v->result;
}

//== unit fault simulator fuzz
/* A store at the far end of a connection, for what pulls from it: its own idea
 * of NAME/pull and /blocks, and of a server of them, as nbdserve.c says in the
 * head of its part on blocks that travel.  It moves no byte itself: it is told
 * what has come, and says what is to go.  It lies where it is told to. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The peer at these two ends, for nbdserve_cas_pull and nbdserve_cas_repair */
#define FAR_PEER(in, out) \
  (&(struct nbdserve_peer){.in_fd = (in), .out_fd = (out)})

/* SHA-256; behind #include "nbdserve.c" */
static void far_sum(const void *p, size_t n, unsigned char sum[32]);

/* A sealed snapshot: all of NAME/pull */
struct far {
  uint32_t bs, fan; /* bytes of a block; nodes below one */
  uint64_t size, blocks;
  uint64_t count[4], at[4]; /* nodes of d0 to d3, and where they begin */
  uint64_t data, end;       /* where the blocks do, and all ends */
  unsigned char *b;         /* [end] */
  char id[72];
  char part[80]; /* what of it is there is called so */
};

enum far_kind {
  FAR_GREETING,
  FAR_OPTION, /* a reply to GO: size, block sizes, ACK */
  FAR_ANSWER, /* to a READ or WRITE: of a pull head, d3, d2, d1, d0, blocks */
  FAR_KINDS
};
/* In the nth message of that kind n bytes at off are value, or all of it */
struct far_lie {
  enum far_kind kind;
  int nth;
  size_t off, n;
  uint64_t value;
};
enum {
  FAR_FOUND = 12288
}; /* there the blocks of /blocks begin */
struct far_talk {
  const struct far *far;      /* what it has */
  const struct far_lie *lies; /* up to one with n 0; or NULL */
  int haggles;                /* so many replies come before those that count */
  int reverse; /* what came together is answered from the end on */
  int phase;   /* 0: flags come; 1: an option; 2: requests; 3: it is over */
  int is_box;  /* it is /blocks */
  int nth[FAR_KINDS];
  unsigned char box[FAR_FOUND]; /* the head and the SHA-256s that are wanted */
  unsigned char in[16384];      /* [nin]: what has come of a message */
  size_t nin;
  unsigned char *out; /* [nout]: what is to go; room for `room` */
  size_t nout, room;
};

static void far_put(unsigned char *p, size_t n, uint64_t v) {
  for (; n > 0; v >>= 8)
    p[--n] = (unsigned char)v;
}

static uint64_t far_get(const unsigned char *p, size_t n) {
  uint64_t v = 0;
  while (n-- > 0)
    v = v << 8 | *p++;
  return v;
}

static int far_is_zero(const unsigned char *p, size_t n) {
  return !*p && !memcmp(p, p + 1, n - 1);
}

/* Room for a snapshot of that size, all zeroes */
static void far_make(struct far *far, uint32_t bs, uint32_t fan,
                     uint64_t size) {
  uint64_t n = (size + bs - 1) / bs, off = 4096;
  int k;
  memset(far, 0, sizeof *far);
  far->bs = bs;
  far->fan = fan;
  far->size = size;
  far->blocks = n;
  for (k = 0; k < 4; k++, n = (n + fan - 1) / fan)
    far->count[k] = n;
  for (k = 4; k-- > 0; off += (far->count[k] * 32 + 4095) / 4096 * 4096)
    far->at[k] = off;
  far->data = (off + (1 << 20) - 1) >> 20 << 20;
  far->end = far->data + far->blocks * bs;
  far->b = calloc(1, (size_t)far->end);
  if (!far->b) exit(2);
}

static unsigned char *far_node(const struct far *far, int level, uint64_t i) {
  return far->b + far->at[level] + 32 * i;
}

static unsigned char *far_block(const struct far *far, uint64_t i) {
  return far->b + far->data + far->bs * i;
}

/* Computes what is above the nodes of a level: those, the id and the head. */
static void far_raise(struct far *far, int level) {
  unsigned char *run = calloc(far->fan, 32), sum[32];
  unsigned char top[58] = "nbdserve-cid-2";
  uint64_t i, n;
  if (!run) exit(2);
  for (; level < 4; level++)
    for (i = 0; i < far->count[level]; i += far->fan) {
      n = far->count[level] - i;
      if (n > far->fan) n = far->fan;
      memset(run, 0, far->fan * 32);
      memcpy(run, far_node(far, level, i), n * 32);
      far_sum(run, far->fan * 32, sum);
      if (far_is_zero(run, far->fan * 32)) memset(sum, 0, 32);
      memcpy(level < 3 ? far_node(far, level + 1, i / far->fan) : top + 26, sum,
             32);
    }
  free(run);
  far_put(top + 14, 4, far->bs);
  far_put(top + 18, 8, far->size);
  far_sum(top, sizeof top, sum);
  memcpy(far->b, "NBDSPULL", 8);
  far_put(far->b + 8, 4, 1);
  far_put(far->b + 12, 4, far->bs);
  far_put(far->b + 16, 8, far->size);
  memcpy(far->b + 24, sum, 32);
  strcpy(far->id, "sha256-");
  for (i = 0; i < 32; i++)
    snprintf(far->id + 7 + 2 * i, 3, "%02x", sum[i]);
  snprintf(far->part, sizeof far->part, "%s/partial", far->id);
}

/* Computes all that hangs on the blocks. */
static void far_seal(struct far *far) {
  uint64_t i;
  for (i = 0; i < far->blocks; i++) {
    memset(far_node(far, 0, i), 0, 32);
    if (!far_is_zero(far_block(far, i), far->bs))
      far_sum(far_block(far, i), far->bs, far_node(far, 0, i));
  }
  far_raise(far, 0);
}

static void far_free(struct far *far) {
  free(far->b);
  far->b = NULL;
}

/* The next message is p[0..n), or what the lies make of it.  Of an answer that
 * is an error only the head goes. */
static void far_say(struct far_talk *t, enum far_kind kind,
                    const unsigned char *p, size_t n) {
  const struct far_lie *lie = t->lies;
  unsigned char *to;
  if (t->nout + n > t->room) {
    t->room = 2 * t->room + n;
    t->out = realloc(t->out, t->room);
    if (!t->out) exit(2);
  }
  to = memcpy(t->out + t->nout, p, n);
  for (; lie && lie->n; lie++)
    if (lie->kind == kind && lie->nth == t->nth[kind] && lie->off < n) {
      size_t off = lie->off;
      do
        far_put(to + off, lie->n, lie->value);
      while (lie->n == 1 && lie->value == 0xee && ++off < n);
    }
  t->nth[kind]++;
  if (kind == FAR_ANSWER && !far_is_zero(to + 4, 4)) n = 16;
  t->nout += n;
}

static void far_reply(struct far_talk *t, uint32_t type, const void *data,
                      size_t n) {
  unsigned char b[200];
  far_put(b, 8, UINT64_C(0x3e889045565a9));
  far_put(b + 8, 4, 7);
  far_put(b + 12, 4, type);
  far_put(b + 16, 4, n);
  memcpy(b + 20, data, n);
  far_say(t, FAR_OPTION, b, 20 + n);
}

/* The option GO, for a name of n bytes */
static void far_go(struct far_talk *t, const unsigned char *name, size_t n) {
  unsigned char b[20] = {0};
  int i;
  for (i = 0; i < t->haggles; i++)
    far_reply(t, 3, "\0\1name", 6);
  t->is_box = n == 7 && !memcmp(name, "/blocks", 7);
  if (!t->is_box && (n < 6 || memcmp(name + n - 5, "/pull", 5))) {
    far_reply(t, 0x80000006, "seal\n\033 it", 9);
    return;
  }
  far_put(b + 2, 8, t->is_box ? FAR_FOUND + 256 * t->far->bs : t->far->end);
  far_put(b + 10, 2, 1);
  far_reply(t, 3, b, 12);
  far_put(b, 2, 3);
  far_put(b + 2, 4, 1);
  far_put(b + 6, 4, 4096);
  far_put(b + 10, 4, 32 << 20);
  far_reply(t, 3, b, 14);
  far_reply(t, 1, "", 0);
  t->phase = 2;
}

/* The block that has the i-th SHA-256 that is wanted, or NULL */
static const unsigned char *far_find(const struct far_talk *t, uint64_t i) {
  const unsigned char *sum = t->box + 4096 + 32 * i;
  uint64_t k;
  for (k = 0; k < t->far->blocks; k++)
    if (!memcmp(sum, far_node(t->far, 0, k), 32) && !far_is_zero(sum, 32))
      return far_block(t->far, k);
  return NULL;
}

static void far_answer(struct far_talk *t, const unsigned char *h) {
  uint64_t off = far_get(h + 16, 8), len = far_get(h + 24, 4), i;
  int command = (int)far_get(h + 6, 2), is_bad;
  unsigned char *b = calloc(1, 16 + len);
  if (!b) exit(2);
  far_put(b, 4, 0x67446698);
  memcpy(b + 8, h + 8, 8);
  is_bad = off + len > (t->is_box ? FAR_FOUND + 256 * t->far->bs : t->far->end);
  if (command == 2) t->phase = 3;
  if (command == 1) is_bad |= off < 4096 || off + len > FAR_FOUND;
  if (command == 1 && !is_bad) memcpy(t->box + off, h + 28, len);
  if (command == 0 && !is_bad && !t->is_box)
    memcpy(b + 16, t->far->b + off, len);
  memcpy(t->box, "NBDSBLKS\0\0\0\1", 12);
  far_put(t->box + 12, 4, t->far->bs);
  if (command == 0 && !is_bad && t->is_box && off + len <= FAR_FOUND)
    memcpy(b + 16, t->box + off, len);
  for (i = 0; command == 0 && t->is_box && !is_bad && off >= FAR_FOUND &&
              i < len / t->far->bs;
       i++) {
    const unsigned char *p = far_find(t, (off - FAR_FOUND) / t->far->bs + i);
    if (p) memcpy(b + 16 + i * t->far->bs, p, t->far->bs);
    is_bad = !p;
  }
  if (is_bad) b[7] = 5;
  if (command < 2) far_say(t, FAR_ANSWER, b, command ? 16 : 16 + len);
  free(b);
}

/* How many bytes the message has that begins with t->in, or as many as tell */
static size_t far_length(const struct far_talk *t) {
  const unsigned char *h = t->in;
  size_t n = t->phase == 0 ? 4 : t->phase == 1 ? 16 : 28;
  if (t->nin < n || !t->phase) return n;
  if (t->phase == 1) return n + (size_t)far_get(h + 12, 4);
  return n + (far_get(h + 6, 2) == 1 ? (size_t)far_get(h + 24, 4) : 0);
}

/* It begins: a greeting. */
static void far_begin(struct far_talk *t, const struct far *far) {
  t->far = far;
  far_say(t, FAR_GREETING, (const unsigned char *)"NBDMAGICIHAVEOPT\0\3", 18);
}

/* Puts the pieces of p[0..n) that begin at at[0..k) into the opposite order. */
static void far_turn(unsigned char *p, size_t n, const size_t *at, int k) {
  unsigned char *all = malloc(n + 1), *to = p;
  size_t end = n;
  if (!all) exit(2);
  memcpy(all, p, n);
  while (k-- > 0) {
    memcpy(to, all + at[k], end - at[k]);
    to += end - at[k];
    end = at[k];
  }
  free(all);
}

/* What it hears */
static void far_hear(struct far_talk *t, const unsigned char *p, size_t n) {
  size_t from = t->nout, at[64];
  int k = 0;
  for (; n > 0 && t->phase < 3; p++, n--) {
    if (t->nin == sizeof t->in) exit(2);
    t->in[t->nin++] = *p;
    if (t->nin < far_length(t)) continue;
    t->nin = 0;
    if (t->phase == 2 && k < 64) at[k++] = t->nout - from;
    if (t->phase == 2)
      far_answer(t, t->in);
    else if (t->phase == 1)
      far_go(t, t->in + 20, (size_t)far_get(t->in + 16, 4));
    else
      t->phase = 1;
  }
  if (t->reverse) far_turn(t->out + from, t->nout - from, at, k);
}

//== unit fault
/* How it is talked to */
struct far_end {
  struct far_talk t;
  pthread_t thread;
  int fd;
  int from;    /* 0, or the descriptor that it hears on instead of fd */
  size_t left; /* bytes until it says nothing any more, and then */
  int then;    /* 0: it ends what it says; 1: it is silent; 2: it goes */
  size_t each; /* bytes that it says at a time; or */
  size_t ear;  /* hears */
  int sleeps;  /* milliseconds before each of them */
};

static void *far_run(void *arg) {
  struct far_end *end = arg;
  static const size_t most = 65536;
  unsigned char *b = malloc(most);
  size_t said = 0, n;
  int from = end->from ? end->from : end->fd;
  CHECK(b != NULL);
  for (;;) {
    while (said < end->t.nout && end->left) {
      n = end->t.nout - said;
      if (n > end->each) n = end->each;
      if (n > end->left) n = end->left;
      if (end->sleeps) usleep((unsigned)end->sleeps * 1000);
      if (end->from && write(end->fd, end->t.out + said, n) != (ssize_t)n)
        break;
      if (!end->from && t_write(end->fd, end->t.out + said, n)) break;
      said += n;
      end->left -= n;
      if (!end->left && end->then == 0) shutdown(end->fd, SHUT_WR);
    }
    if (!end->left && end->then == 2) break;
    n = (size_t)read(from, b, end->ear ? end->ear : most);
    if (n == 0 || n == (size_t)-1) break;
    if (end->left) far_hear(&end->t, b, n);
  }
  close(end->fd);
  if (from != end->fd) close(from);
  free(b);
  return NULL;
}

/* Begins to serve a snapshot; returns the descriptor to talk to it. */
static int far_start(struct far_end *end, const struct far *far) {
  int fd[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
  if (!end->left && !end->then) end->left = SIZE_MAX;
  if (!end->each) end->each = SIZE_MAX;
  end->fd = fd[0];
  far_begin(&end->t, far);
  CHECK(pthread_create(&end->thread, NULL, far_run, end) == 0);
  return fd[1];
}

static void far_stop(struct far_end *end, int fd) {
  close(fd);
  pthread_join(end->thread, NULL);
  free(end->t.out);
}

//== unit
/* Defends "in your own program": what nbdserve.h promises a host of its calls
 * and asks of the host's functions.  unit VERB DIRECTORY */

/* The library's allocator: counts what it has not given back */
static pthread_mutex_t m_lock = PTHREAD_MUTEX_INITIALIZER;
static long m_blocks;

static long m_count(long more) {
  long blocks;
  pthread_mutex_lock(&m_lock);
  blocks = m_blocks += more;
  pthread_mutex_unlock(&m_lock);
  return blocks;
}

static long m_left(void) {
  return m_count(0);
}

static void *m_alloc(size_t n) {
  void *p = malloc(n);
  if (p) (void)m_count(1);
  return p;
}

static void m_free(void *p) {
  if (p) (void)m_count(-1);
  free(p);
}

#define NBDSERVE_MALLOC m_alloc
#define NBDSERVE_FREE m_free

static int u_recv_ms; /* how long each recv() of the library takes */

static ssize_t u_recv(int fd, void *b, size_t n, int flags) {
  if (u_recv_ms) t_sleep(u_recv_ms);
  return recv(fd, b, n, flags);
}

#undef recv
#define recv u_recv
#include "nbdserve.c"

static const char *dir; /* for sockets and files */

//== unit fault
static void *s_run(void *arg) {
  struct served *v = arg;
  v->result = nbdserve_serve(v->s, v->fd, v->fd, v->name);
  close(v->fd);
  return NULL;
}

/* A server with one export, and a client of it */
struct one {
  struct nbdserve *s;
  struct served v;
  struct t_conn c;
};

static void o_open(struct one *o, const struct nbdserve_export *e,
                   int structured) {
  memset(o, 0, sizeof *o);
  CHECK(nbdserve_new(&o->s, NULL) == 0);
  CHECK(nbdserve_add(o->s, e) == 0);
  s_start(&o->v, o->s, &o->c);
  CHECK(t_open(&o->c, o->c.fd, "", structured) == 0);
}

static void o_close(struct one *o) {
  t_close(&o->c);
  CHECK(s_end(&o->v) == 0);
  nbdserve_free(o->s);
}

//== unit
/* A host's backend in memory, which watches how it is called */
struct ram {
  pthread_mutex_t lock;
  unsigned char *data;
  uint64_t size;
  uint32_t min;  /* calls must be multiples of it */
  int now, most; /* calls into it at the moment, and at most */
  int blocks_ms; /* every call takes that long */
  int hold;      /* reads of byte 0 wait for its end (t_hold) */
  int calls[8], closes;
  unsigned flags; /* of the last call */
  int last;       /* what it was */
  int error;      /* what calls return */
  int flush_error;
};

static int r_enter(void *ctx, int what, uint64_t off, uint64_t len,
                   unsigned flags) {
  struct ram *r = ctx;
  pthread_mutex_lock(&r->lock);
  if (++r->now > r->most) r->most = r->now;
  r->calls[what]++;
  r->last = what;
  r->flags = flags;
  CHECK(r->closes == 0);
  if (what != FLUSH) {
    CHECK(len > 0 && off <= r->size && len <= r->size - off);
    CHECK(!r->min || (off % r->min == 0 && len % r->min == 0));
  }
  pthread_mutex_unlock(&r->lock);
  if (r->blocks_ms) t_sleep(r->blocks_ms);
  while (what == READ && off == 0 && t_hold(&r->hold, -1))
    t_sleep(1);
  return r->error;
}

/* Copies or (from NULL) clears, as one step: clients may let their requests
 * overlap, whose order is theirs to see to */
static void r_copy(struct ram *r, void *to, const void *from, uint64_t len) {
  pthread_mutex_lock(&r->lock);
  if (from)
    memcpy(to, from, (size_t)len);
  else
    memset(to, 0, (size_t)len);
  pthread_mutex_unlock(&r->lock);
}

static int r_leave(void *ctx, int error) {
  struct ram *r = ctx;
  pthread_mutex_lock(&r->lock);
  r->now--;
  pthread_mutex_unlock(&r->lock);
  return error;
}

static int r_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                  uint32_t f) {
  struct ram *r = ctx;
  int error = r_enter(ctx, READ, off, len, f);
  if (!error) r_copy(r, buf, r->data + off, len);
  return r_leave(ctx, error);
}

static int r_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                   uint32_t f) {
  struct ram *r = ctx;
  int error = r_enter(ctx, WRITE, off, len, f);
  CHECK(!(f & ~1u)); /* FUA */
  if (!error) r_copy(r, r->data + off, buf, len);
  return r_leave(ctx, error);
}

static int r_flush(void *ctx, uint32_t f) {
  struct ram *r = ctx;
  int error = r_enter(ctx, FLUSH, 0, 0, f);
  return r_leave(ctx, r->flush_error ? r->flush_error : error);
}

static int r_trim(void *ctx, uint64_t off, uint64_t len, uint32_t f) {
  return r_leave(ctx, r_enter(ctx, TRIM, off, len, f));
}

static int r_zero(void *ctx, uint64_t off, uint64_t len, uint32_t f) {
  struct ram *r = ctx;
  int error = r_enter(ctx, ZEROES, off, len, f);
  if (!error && f & NBDSERVE_CMD_FAST_ZERO) error = -ENOTSUP;
  if (!error) r_copy(r, r->data + off, NULL, len);
  return r_leave(ctx, error);
}

/* Odd blocks of 4096 are holes; told in pieces of 1024 */
static int r_extents(void *ctx, uint64_t off, uint64_t len, uint32_t f,
                     struct nbdserve_extents *out) {
  uint64_t end = off + len;
  int error = r_enter(ctx, STATUS, off, len, f);
  while (!error && off < end) {
    uint64_t piece = 1024 - off % 1024;
    if (nbdserve_extent(out, piece, off / 4096 % 2 ? 3 : 0)) break;
    off += piece;
  }
  return r_leave(ctx, error);
}

static void r_close(void *ctx) {
  struct ram *r = ctx;
  r->closes++;
}

static const struct nbdserve_ops r_ops = {
    r_read, r_write, r_flush, r_trim, r_zero, NULL, r_extents, r_close, NULL};
static const struct nbdserve_ops r_least = {.read = r_read, .write = r_write};

static struct ram *r_new(uint64_t size) {
  struct ram *r = t_alloc(sizeof *r);
  pthread_mutex_init(&r->lock, NULL);
  r->data = t_alloc((size_t)size);
  memset(r->data, 'r', (size_t)size);
  r->size = size;
  return r;
}

static struct nbdserve_export r_export(struct ram *r, uint32_t flags) {
  struct nbdserve_export e = {0};
  e.name = "ram";
  e.size = r->size;
  e.flags = flags;
  e.ops = &r_ops;
  e.ctx = r;
  return e;
}

/* Exports that are refused, each for the one thing that is changed in a good
 * one.  name is too long for one. */
#define REFUSED(change) \
  do { \
    e = good; \
    change; \
    CHECK(nbdserve_add(s, &e) == -EINVAL); \
  } while (0)
static void a_add(struct nbdserve *s, struct ram *r, const char *name) {
  static const struct nbdserve_ops no_read = {.write = r_write};
  struct nbdserve_export good = r_export(r, 0), e;
  REFUSED(e.ops = &no_read);
  REFUSED(e.ops = NULL);
  REFUSED(e.min_block = 3);
  REFUSED(e.min_block = 131072);
  REFUSED(e.preferred_block = 256);
  REFUSED(e.preferred_block = 5000);
  REFUSED((e.min_block = 8192, e.preferred_block = 4096));
  REFUSED(e.max_request = 512); /* below the preferred block */
  REFUSED(e.max_request = 0xffffffffu);
  REFUSED(e.size = (uint64_t)INT64_MAX + 1);
  REFUSED(e.size = UINT64_MAX);
  REFUSED(e.flags = 0x80000000u);
  REFUSED(e.name = name);
  REFUSED(e.description = name);
  CHECK(r->closes == 0); /* what was refused is not owned */
}
#undef REFUSED

/* Addresses that cannot be listened on, the last one too long for name */
static void a_listen(struct nbdserve *s, char name[305]) {
  CHECK(nbdserve_listen(s, "") == -EINVAL);
  CHECK(nbdserve_listen(s, "unix:") == -EINVAL);
  CHECK(nbdserve_listen(s, "tcp:127.0.0.1") == -EINVAL);
  CHECK(nbdserve_listen(s, "tcp:127.0.0.1:70000") == -EINVAL);
  CHECK(nbdserve_listen(s, "tcp:127.0.0.1:x") == -EINVAL);
  CHECK(nbdserve_listen(s, "tcp:no.such.host:0") == -EINVAL);
  CHECK(nbdserve_listen(s, "fd:x") == -EINVAL);
  CHECK(nbdserve_listen(s, "fd:987") < 0);
  CHECK(nbdserve_listen(s, "unix:/no/such/directory/s") == -ENOENT);
  memset(name, '/', 300);
  name[300] = 0;
  memcpy(name, "unix:", 5);
  CHECK(nbdserve_listen(s, name) == -ENAMETOOLONG);
}

static void u_arguments(void) {
  static char name[4098];
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  struct ram *r = r_new(4096);
  struct nbdserve_export e;
  struct nbdserve_stats stats;
  char buf[200];
  int i;

  CHECK(!strcmp(nbdserve_version(), NBDSERVE_VERSION));
  for (i = 0; i < 3; i++) {
    config.version = NBDSERVE_VERSION_NUMBER + (i == 0 ? 10000u : 0);
    config.flags = i == 1 ? 0x80000000u : 0;
    config.max_conn = 0;
    if (i == 2) config.threads = 0xffffffffu;
    CHECK(nbdserve_new(&s, &config) == -EINVAL);
  }
  CHECK(nbdserve_new(&s, NULL) == 0);
  memset(name, 'x', 4097);
  a_add(s, r, name);
  e = r_export(r, 0);
  name[4096] = 0;
  e.description = name;
  CHECK(nbdserve_add(s, &e) == 0);
  CHECK(nbdserve_add(s, &e) == -EEXIST);
  CHECK(nbdserve_resize(s, "none", 1) == -ENOENT);
  CHECK(nbdserve_resize(s, "ram", (uint64_t)1 << 63) == -EINVAL);
  CHECK(nbdserve_uri(s, "ram", buf, sizeof buf) == -ENOENT);
  a_listen(s, name);
  nbdserve_stats(s, &stats);
  CHECK(stats.clients == 0 && stats.requests == 0);
  nbdserve_free(s);
  CHECK(r->closes == 1);
  nbdserve_free(NULL);
}

static void u_failed(void) {
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  int i;
  for (i = 0; i < 4; i++) {
    config.version = i ? NBDSERVE_VERSION_NUMBER : 0;
    config.threads = i == 1 ? 0xffffffffu : 0;
    config.max_conn = i == 2 ? 0xffffffffu : 0;
    config.flags = i == 3 ? 0x80000000u : 0;
    s = (struct nbdserve *)(void *)&config;
    CHECK(nbdserve_new(&s, &config) == -EINVAL && s == NULL);
  }
}

static void u_flags(void) {
  struct ram *r = r_new(4096);
  struct nbdserve_export e;
  struct nbdserve *s;
  uint32_t flag;
  CHECK(nbdserve_new(&s, NULL) == 0);
  for (flag = 2 * NBDSERVE_EXPORT_UNSAFE; flag; flag <<= 1) {
    e = r_export(r, flag);
    CHECK(nbdserve_add(s, &e) == -EINVAL);
    e = r_export(r, flag | NBDSERVE_EXPORT_READONLY);
    CHECK(nbdserve_add(s, &e) == -EINVAL);
  }
  e = r_export(r, 2 * NBDSERVE_EXPORT_UNSAFE - 1); /* all that are known */
  CHECK(nbdserve_add(s, &e) == 0);
  nbdserve_free(s);
}

static void u_null(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  char path[100], null[200], empty[200];
  snprintf(path, sizeof path, "unix:%s/null", dir);
  o_open(&o, &e, 0);
  CHECK(nbdserve_resize(o.s, NULL, 4096) == -ENOENT); /* it has a name */
  e = r_export(r_new(65536), 0);
  e.name = NULL;
  CHECK(nbdserve_add(o.s, &e) == 0);
  CHECK(nbdserve_resize(o.s, NULL, 4096) == 0);
  CHECK(nbdserve_resize(o.s, "", 4096) == 0);
  CHECK(nbdserve_listen(o.s, path) == 0);
  CHECK(nbdserve_uri(o.s, NULL, null, sizeof null) == 0);
  CHECK(nbdserve_uri(o.s, "", empty, sizeof empty) == 0);
  CHECK(!strcmp(null, empty));
  o_close(&o);
}

static void u_uris(void) {
  struct nbdserve *s;
  char buf[300], want[300], path[100];
  int i;
  CHECK(nbdserve_new(&s, NULL) == 0);
  snprintf(path, sizeof path, "unix:%s/a %%?&=", dir);
  CHECK(nbdserve_listen(s, path) == 0);
  CHECK(nbdserve_listen(s, path) == -EADDRINUSE);
  snprintf(want, sizeof want,
           "nbd+unix:///e%%20%%3F%%23/%%C3%%A4?socket="
           "%s/a%%20%%25%%3F%%26%%3D",
           dir);
  CHECK(nbdserve_uri(s, "e ?#/\303\244", buf, sizeof buf) == 0);
  if (strcmp(buf, want)) fprintf(stderr, "%s\n%s\n", buf, want);
  CHECK(!strcmp(buf, want));
  for (i = 0; i < 2 * (int)sizeof buf; i++) { /* every size, with a guard */
    const char *name = i % 2 ? "" : "e ?#/\303\244";
    size_t size = (size_t)i / 2, k;
    size_t need = strlen(want) + 1 - (i % 2 ? strlen("e%20%3F%23/%C3%A4") : 0);
    int err;
    memset(buf, '!', sizeof buf);
    err = nbdserve_uri(s, name, buf, size);
    CHECK(err == (size < need ? -ERANGE : 0));
    for (k = size; k < sizeof buf; k++)
      CHECK(buf[k] == '!');
  }
  nbdserve_free(s);
  CHECK(access(path + 5, F_OK) != 0); /* the socket is gone */
}

/* n clients with 48 reads in flight each: the most calls at a time */
static int u_busy(struct ram *r, int n, uint32_t flags) {
  struct nbdserve *s;
  struct nbdserve_export e = r_export(r, flags);
  struct served v[4];
  struct t_conn c[4];
  static struct t_reply reply;
  int i, k;
  memset(v, 0, sizeof v);
  r->blocks_ms = 8;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  for (i = 0; i < n; i++) {
    s_start(&v[i], s, &c[i]);
    CHECK(t_open(&c[i], c[i].fd, "", i & 1) == 0);
    for (k = 0; k < 48; k++)
      CHECK(t_send(&c[i], 0, READ, (uint32_t)k, 512u * (unsigned)k, 512,
                   NULL) == 0);
  }
  for (i = 0; i < n; i++) {
    uint64_t seen = 0;
    for (k = 0; k < 48; k++) {
      CHECK(t_recv(&c[i], &reply) && !reply.error && reply.done);
      CHECK(!(seen >> (reply.cookie & 63) & 1));
      seen |= (uint64_t)1 << (reply.cookie & 63);
    }
    t_close(&c[i]);
    CHECK(s_end(&v[i]) == 0);
  }
  CHECK(r->closes == 0);
  nbdserve_free(s);
  CHECK(r->closes == 1 && r->now == 0);
  return r->most;
}

static void u_parallel(void) {
  int most = u_busy(r_new(65536), 1, 0);
  CHECK(most > 1 && most <= 16);
  most = u_busy(r_new(65536), 3, 0);
  CHECK(most > 1 && most <= 48);
}

static void u_serial(void) {
  CHECK(u_busy(r_new(65536), 3, NBDSERVE_EXPORT_SERIAL) == 1);
}

/* A slow request holds nobody up */
static void u_slow(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  static struct t_reply reply;
  char b[512] = "";
  int i, structured;
  for (structured = 0; structured < 2; structured++) {
    r->closes = 0;
    t_hold(&r->hold, 1);
    o_open(&o, &e, structured);
    CHECK(t_send(&o.c, 0, READ, 1, 0, 512, NULL) == 0);
    for (i = 0; i < 3; i++) {
      CHECK(t_do(&o.c, 0, READ, 512, 512, b) == 0);
      CHECK(t_do(&o.c, FUA, WRITE, 512, 512, b) == 0);
      CHECK(t_do(&o.c, 0, TRIM, 512, 512, NULL) == 0);
      CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
    }
    t_hold(&r->hold, 0);
    CHECK(t_recv(&o.c, &reply) && (uint32_t)reply.cookie == 1 && !reply.error);
    o_close(&o);
  }
}

/* Who leaves with requests in flight gets their answers */
static void u_leave(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  static struct t_reply reply;
  char b[512] = "";
  int i, how;
  r->blocks_ms = 5;
  for (how = 0; how < 4; how++) { /* DISC or the end, both kinds of replies */
    uint64_t seen = 0;
    r->closes = 0;
    memset(r->data, 'r', 65536);
    o_open(&o, &e, how & 1);
    for (i = 0; i < 40; i++)
      CHECK(t_send(&o.c, 0, i % 2 ? READ : WRITE, (uint32_t)i,
                   512u * (unsigned)i, 512, b) == 0);
    if (how & 2)
      CHECK(t_send(&o.c, 0, DISC, 0, 0, 0, NULL) == 0);
    else
      shutdown(o.c.fd, SHUT_WR);
    for (i = 0; i < 40; i++) {
      CHECK(t_recv(&o.c, &reply) && !reply.error && reply.done);
      CHECK(!(seen >> (reply.cookie & 63) & 1));
      seen |= (uint64_t)1 << (reply.cookie & 63);
    }
    CHECK(!t_recv(&o.c, &reply) && s_end(&o.v) == 0);
    for (i = 0; i < 40; i++)
      CHECK(r->data[512 * i] == (i % 2 ? 'r' : 0));
    close(o.c.fd);
    nbdserve_free(o.s);
  }
}

/* A client that is gone raises no SIGPIPE, which nobody catches here */
/* No client over TCP waits for Nagle's algorithm */
static void u_nagle(void) {
#if !NBDSERVE_NO_TCP
  struct sockaddr_in a = {.sin_family = AF_INET};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  socklen_t n = sizeof a;
  int on = 0, fd, listener = socket(AF_INET, SOCK_STREAM, 0);
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK(bind(listener, (void *)&a, n) == 0 && listen(listener, 1) == 0);
  CHECK(getsockname(listener, (void *)&a, &n) == 0);
  CHECK((fd = socket(AF_INET, SOCK_STREAM, 0)) >= 0);
  CHECK(connect(fd, (void *)&a, n) == 0);
  CHECK((v.fd = accept(listener, NULL, NULL)) >= 0);
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  v.s = s;
  CHECK(pthread_create(&v.thread, NULL, s_run, &v) == 0);
  CHECK(t_open(&c, fd, "", 0) == 0);
  n = sizeof on;
  CHECK(getsockopt(v.fd, IPPROTO_TCP, TCP_NODELAY, &on, &n) == 0 && on);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
  close(listener);
#endif
}

static void u_vanish(void) {
  struct nbdserve_export e;
  struct one o;
  char disk[100];
  int i, k;
  snprintf(disk, sizeof disk, "%s/disk", dir);
  CHECK(truncate(disk, 8 << 20) == 0);
  for (i = 0; i < 40; i++) {
    uint32_t len = i % 4 == 0 ? 4096 : i % 4 == 1 ? 65536 : 4u << 20;
    memset(&e, 0, sizeof e);
    CHECK(nbdserve_flat_open(disk, NULL, &e) == 0);
    o_open(&o, &e, i & 1);
    for (k = 0; k < 20; k++)
      if (t_send(&o.c, 0, k % 5 ? READ : FLUSH, 1, 0, k % 5 ? len : 0, NULL))
        break;
    if (i % 3) t_sleep(i % 3);
    close(o.c.fd);
    (void)s_end(&o.v);
    nbdserve_free(o.s);
  }
}

static void u_requests(void) {
  struct ram *r = r_new(65536 + 100);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  unsigned char b[8192];
  int min;
  memset(b, 'w', sizeof b);
  for (min = 0; min < 2; min++) {
    r->closes = 0;
    r->min = e.min_block = min ? 4096 : 0;
    e.max_request = 8192;
    e.flags = NBDSERVE_EXPORT_MULTI_CONN;
    CHECK(nbdserve_new(&o.s, NULL) == 0 && nbdserve_add(o.s, &e) == 0);
    memset(&o.v, 0, sizeof o.v);
    o.v.name = ""; /* the block size needs no asking this way */
    s_start(&o.v, o.s, &o.c);
    CHECK(t_do(&o.c, 0, READ, 65536, 200, b) == 22);
    CHECK(t_do(&o.c, 0, READ, 100, 512, b) == (min ? 22 : 0));
    CHECK(t_do(&o.c, 0, READ, 0, 8192 + 4096, b) == 22);
    CHECK(t_do(&o.c, 0, READ, UINT64_MAX, 4096, b) == 22);
    CHECK(t_do(&o.c, 0, READ, 4096, 0, b) == 0);
    CHECK(t_do(&o.c, 0, WRITE, 65536 + 4096, 4096, b) == 28);
    CHECK(t_do(&o.c, 0, WRITE, 0, 8192, b) == 0 && r->data[8191] == 'w');
    CHECK(t_do(&o.c, 0, ZEROES, 0, 65536, b) == 0 && r->data[65535] == 0);
    CHECK(t_do(&o.c, NO_HOLE, ZEROES, 0, 4096, b) == 0);
    CHECK(r->flags == NBDSERVE_CMD_NO_HOLE && r->last == ZEROES);
    CHECK(t_do(&o.c, 0, TRIM, 0, 65536, b) == 0 && r->last == TRIM);
    CHECK(t_do(&o.c, 0, TRIM, 4096, UINT32_MAX, b) == 22);
    o_close(&o);
  }
}

/* Flushes seen after one FUA write, zero and trim under these flags */
static int u_flushes(uint32_t flags, int fua, unsigned *seen) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, flags);
  struct one o;
  char b[512] = "";
  int n;
  o_open(&o, &e, 1);
  CHECK(t_do(&o.c, fua, WRITE, 0, 512, b) == 0);
  CHECK(r->last == (r->calls[FLUSH] ? FLUSH : WRITE));
  *seen = r->flags;
  CHECK(t_do(&o.c, fua, ZEROES, 0, 512, NULL) == 0);
  CHECK(t_do(&o.c, fua, TRIM, 0, 512, NULL) == 0);
  CHECK(t_do(&o.c, fua, READ, 0, 512, b) == 0);
  n = r->calls[FLUSH];
  CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
  CHECK(r->calls[FLUSH] == n + !(flags & NBDSERVE_EXPORT_UNSAFE));
  o_close(&o);
  return n;
}

static void u_fua(void) {
  unsigned seen;
  CHECK(u_flushes(0, 0, &seen) == 0);
  CHECK(u_flushes(0, FUA, &seen) == 3);
  CHECK(u_flushes(NBDSERVE_EXPORT_NATIVE_FUA, FUA, &seen) == 0);
  CHECK(seen == NBDSERVE_CMD_FUA);
  CHECK(u_flushes(NBDSERVE_EXPORT_UNSAFE, FUA, &seen) == 0);
  CHECK(u_flushes(NBDSERVE_EXPORT_UNSAFE | NBDSERVE_EXPORT_NATIVE_FUA, FUA,
                  &seen) == 0);
  CHECK(seen == 0);
  CHECK(u_flushes(NBDSERVE_EXPORT_WRITETHROUGH, 0, &seen) == 3);
  CHECK(u_flushes(NBDSERVE_EXPORT_WRITETHROUGH | NBDSERVE_EXPORT_NATIVE_FUA, 0,
                  &seen) == 0);
  CHECK(seen == NBDSERVE_CMD_FUA);
}

static void u_errors(void) {
  static const struct {
    int host, wire;
  } map[] = {{EPERM, 1},   {EIO, 5},        {ENOMEM, 12},
             {EINVAL, 22}, {ENOSPC, 28},    {EDQUOT, 28},
             {EFBIG, 28},  {EOVERFLOW, 75}, {ESHUTDOWN, 108}};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  char b[512] = "";
  int i, error;
  for (i = 0; i < 2 * 140; i++) { /* every errno, both kinds of replies */
    int k, want = 0;
    if (i % 140 == 0) {
      if (i) o_close(&o);
      r->error = r->closes = 0;
      o_open(&o, &e, i > 0);
      continue;
    }
    r->error = -(i % 140);
    for (k = 0; k < COUNT(map); k++)
      if (map[k].host == i % 140) want = map[k].wire;
    error = t_do(&o.c, 0, READ, 0, 512, b);
    CHECK(want ? error == want
               : error == 5 || error == 22 || error == 1 || error == 12 ||
                     error == 28);
    CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == error);
    CHECK(t_do(&o.c, 0, TRIM, 0, 512, b) == error);
    CHECK(t_do(&o.c, 0, ZEROES, 0, 512, b) != 95);
    if (i > 140) CHECK(t_do(&o.c, REQ_ONE, STATUS, 0, 512, b) == error);
  }
  r->error = 0;
  CHECK(t_do(&o.c, FAST, ZEROES, 0, 512, b) == 95);
  CHECK(r->data[0] == 'r' && r->flags == NBDSERVE_CMD_FAST_ZERO);
  o_close(&o);
}

static void l_log(void *server, int level, const char *message) {
  static int n;
  struct nbdserve_stats stats;
  nbdserve_stats(*(struct nbdserve **)server, &stats);
  CHECK(stats.clients_now == 1 && level >= 0 && *message);
  t_hold(&n, 1);
}

/* The log callback may ask for the totals, whoever calls it */
static void u_totals(void) {
  struct nbdserve_config config = {0};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  char b[512] = "";
  int i, level;
  alarm(10);
  config.version = NBDSERVE_VERSION_NUMBER;
  config.log = l_log;
  config.ctx = &s;
  for (level = NBDSERVE_LOG_WARNING; level <= NBDSERVE_LOG_TRACE; level++) {
    config.log_level = level;
    r->closes = r->error = 0;
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", level & 1) == 0);
    r->error = -EIO;
    for (i = 0; i < 40; i++) { /* more than are logged */
      CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 5);
      CHECK(t_do(&c, FUA, WRITE, 0, 512, b) == 5);
      CHECK(t_do(&c, 0, READ, 0, 512, b) == 5);
      CHECK(t_do(&c, 0, TRIM, 0, 512, NULL) == 5);
      CHECK(t_do(&c, 0, FLUSH, 0, 0, NULL) == 5);
      CHECK(t_do(&c, 0, READ, 65536, 1, b) == 22);
    }
    t_close(&c);
    CHECK(s_end(&v) == 0);
    r->error = 0; /* or the last flush would be logged, too */
    nbdserve_free(s);
  }
}

static void u_missing(void) {
  struct ram *r = r_new(1 << 20);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  static struct t_reply reply;
  unsigned char b[512] = "", h[32];
  int i;
  e.ops = &r_least;
  e.max_request = 65536;
  o_open(&o, &e, 1);
  /* HAS_FLAGS, WRITE_ZEROES, DF; FAST_ZERO would always be refused */
  CHECK((o.c.flags & ~0x800u) == 0xc1);
  CHECK(t_do(&o.c, 0, ZEROES, 1, (1 << 20) - 2, NULL) == 0);
  CHECK(r->data[0] == 'r' && r->data[(1 << 20) - 1] == 'r');
  CHECK(r->data[1] == 0 && r->data[(1 << 20) - 2] == 0 && r->calls[WRITE] > 15);
  r->data[1] = 'r';
  CHECK(!memcmp(r->data, "rr", 2) && t_do(&o.c, 0, READ, 1, 1, b) == 0);
  if (o.c.flags & 0x800)
    CHECK(t_do(&o.c, FAST, ZEROES, 1, 1, NULL) == 95);
  else
    CHECK(t_do(&o.c, FAST, ZEROES, 1, 1, NULL) == 22);
  CHECK(r->data[1] == 'r');
  CHECK(t_do(&o.c, 0, TRIM, 0, 512, NULL) == 22);
  CHECK(t_do(&o.c, FUA, WRITE, 0, 512, b) == 22);
  CHECK(t_send(&o.c, 0, STATUS, 1, 0, 1 << 20, NULL) == 0);
  CHECK(t_recv(&o.c, &reply) && reply.chunk == 5 && reply.len == 12);
  CHECK(t_get(reply.data + 4, 8) == (uint64_t)(1 << 20) << 32); /* data */
  o_close(&o);

  r = r_new(65536);
  e = r_export(r, NBDSERVE_EXPORT_READONLY);
  o_open(&o, &e, 0);
  CHECK((o.c.flags & ~0x100u) == 3);
  CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 1 && r->calls[WRITE] == 0);
  o_close(&o);

  r = r_new(65536); /* what would write for hours is refused at once */
  e = r_export(r, 0);
  e.ops = &r_least;
  e.size = INT64_MAX;
  o_open(&o, &e, 2);
  for (i = 0; i < 2; i++) {
    t_head(h, i ? FAST : 0, ZEROES, 1, 0, 0);
    t_put(h, 4, 0x21e41c71);
    t_put(h + 24, 8, (uint64_t)INT64_MAX);
    CHECK(t_write(o.c.fd, h, 32) == 0 && t_recv(&o.c, &reply));
    CHECK(reply.error == (i ? 95 : 75) && r->calls[WRITE] == 0);
  }
  CHECK(t_do(&o.c, NO_HOLE, ZEROES, 0, 512, NULL) == 0); /* see r_write */
  CHECK(r->calls[WRITE] == 1);
  o_close(&o);
}

static void *u_run(void *s) {
  return (void *)(intptr_t)nbdserve_run(s);
}

static void u_flush(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  pthread_t run;
  void *result;
  char b[512] = "", address[100];
  snprintf(address, sizeof address, "unix:%s/s", dir);
  o_open(&o, &e, 0);
  CHECK(nbdserve_listen(o.s, address) == 0);
  CHECK(pthread_create(&run, NULL, u_run, o.s) == 0);
  r->flush_error = -EIO;
  CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 0);
  CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 5);
  CHECK(t_do(&o.c, FUA, WRITE, 0, 512, b) == 5);
  CHECK(t_do(&o.c, 0, READ, 0, 512, b) == 0);
  nbdserve_stop(o.s);
  nbdserve_stop(o.s);
  CHECK(pthread_join(run, &result) == 0);
  CHECK((int)(intptr_t)result == -EIO); /* of its flush */
  (void)s_end(&o.v);
  CHECK(r->closes == 0);
  nbdserve_free(o.s);
  CHECK(r->closes == 1);
}

struct shelf {
  struct ram *ram[8];
  int found;
};

static int f_find(void *ctx, const char *name, struct nbdserve_export *out) {
  static const struct nbdserve_export nothing;
  struct shelf *f = ctx;
  CHECK(memcmp(out, &nothing, sizeof nothing) == 0);
  if (strncmp(name, "dyn", 3)) return -ENOENT;
  *out = r_export(f->ram[f->found++] = r_new(4096), 0);
  out->name = name;
  return 0;
}

static int f_list(void *ctx, int (*emit)(void *, const char *, const char *),
                  void *arg) {
  (void)ctx;
  return emit(arg, "dyn1", NULL) || emit(arg, "dyn2", "second") ? 0 : 0;
}

static void u_find(void) {
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  struct shelf f = {{0}, 0};
  struct nbdserve_export e;
  struct served v[3];
  struct t_conn c[3];
  unsigned char b[4200];
  int i;
  memset(v, 0, sizeof v);
  config.version = NBDSERVE_VERSION_NUMBER;
  config.find = f_find;
  config.list = f_list;
  config.ctx = &f;
  CHECK(nbdserve_new(&s, &config) == 0);
  for (i = 0; i < 3; i++) {
    s_start(&v[i], s, &c[i]);
    CHECK(t_open(&c[i], c[i].fd, i < 2 ? "dyn1" : "no", 1) == (i < 2 ? 0 : -1));
  }
  CHECK(f.found >= 2);
  for (i = 0; i < 2; i++)
    CHECK(t_do(&c[i], 0, READ, 0, 512, b) == 0);
  t_close(&c[0]);
  t_close(&c[1]);
  CHECK(s_end(&v[0]) == 0 && s_end(&v[1]) == 0);
  CHECK(t_option(c[2].fd, 3, "", 0) == 0); /* LIST, in the same haggling */
  while (t_answer(c[2].fd, b) != 2)
    ; /* behind the error of GO */
  CHECK(t_get(b, 4) == 4 && !memcmp(b + 4, "dyn1", 4));
  CHECK(t_answer(c[2].fd, b) == 2 && !memcmp(b + 4, "dyn2second", 10));
  CHECK(t_answer(c[2].fd, b) == 1);
  close(c[2].fd);
  (void)s_end(&v[2]);
  nbdserve_free(s);
  for (i = 0; i < f.found; i++)
    CHECK(f.ram[i]->closes == 1);
  f.found = 0; /* with one that takes any name: it lends nothing to others */
  CHECK(nbdserve_new(&s, &config) == 0);
  e = r_export(r_new(65536),
               NBDSERVE_EXPORT_READONLY | NBDSERVE_EXPORT_FALLBACK);
  e.min_block = 512;
  CHECK(nbdserve_add(s, &e) == 0);
  for (i = 0; i < 2; i++) {
    s_start(&v[i], s, &c[i]);
    CHECK(t_open(&c[i], c[i].fd, i ? "no" : "dyn1", 1) == (i ? -1 : 0));
    if (!i) CHECK(c[0].size == 4096 && !(c[0].flags & 2));
    if (!i)
      t_close(&c[0]);
    else
      close(c[1].fd);
    (void)s_end(&v[i]);
  }
  nbdserve_free(s);
  CHECK(f.found >= 1);
  for (i = 0; i < f.found; i++)
    CHECK(f.ram[i]->closes == 1);
}

static void u_extents(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  static struct t_reply reply;
  uint64_t sum = 0;
  int i, n;
  o_open(&o, &e, 1);
  CHECK(t_send(&o.c, 0, STATUS, 1, 100, 60000, NULL) == 0);
  CHECK(t_recv(&o.c, &reply) && reply.chunk == 5 && reply.done);
  n = (int)(reply.len - 4) / 8;
  CHECK(n == 15); /* the pieces of 1024 are one */
  for (i = 0; i < n; i++) {
    uint64_t len = t_get(reply.data + 4 + i * 8, 4);
    CHECK(len == (i == 0 ? 3996u : i < 14 || len > 4000 ? 4096u : 2756u));
    CHECK(t_get(reply.data + 8 + i * 8, 4) == (i % 2 ? 3 : 0));
    CHECK(sum < 60000);
    sum += len;
  }
  CHECK(sum >= 60000);
  CHECK(t_send(&o.c, REQ_ONE, STATUS, 1, 4000, 50, NULL) == 0);
  CHECK(t_recv(&o.c, &reply) && reply.chunk == 5 && reply.len == 12);
  CHECK(t_get(reply.data + 4, 4) == 50 && t_get(reply.data + 8, 4) == 0);
  o_close(&o);
}

static void u_resize(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  struct served v = {0};
  struct t_conn c;
  char b[512];
  o_open(&o, &e, 0);
  CHECK(nbdserve_resize(o.s, "ram", 1000) == 0);
  s_start(&v, o.s, &c);
  CHECK(t_open(&c, c.fd, "", 1) == 0);
  CHECK(c.size == 1000 && o.c.size == 65536);
  CHECK(t_do(&c, 0, READ, 999, 2, b) == 22);
  CHECK(t_do(&o.c, 0, READ, 999, 2, b) == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  o_close(&o);
}

/* A backend whose size moves by itself; what it was told last stays in told */
static uint64_t grown, told;
static uint64_t r_size(void *ctx, uint64_t size) {
  (void)ctx;
  told = size;
  return grown;
}

static void u_sizes(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve_ops ops = r_ops;
  struct served v = {0};
  struct t_conn c;
  struct one o;
  char b[512];
  ops.size = r_size;
  e.ops = &ops;
  grown = 1000;
  o_open(&o, &e, 2);
  CHECK(o.c.size == 1000); /* SET_META asked first */
  grown = 3000;
  s_start(&v, o.s, &c);
  CHECK(t_open(&c, c.fd, "", 1) == 0);
  CHECK(c.size == 3000 && told > 0);
  CHECK(t_do(&c, 0, READ, 2999, 1, b) == 0);
  CHECK(t_do(&o.c, 0, READ, 999, 2, b) == 22); /* it keeps its size */
  t_close(&c);
  CHECK(s_end(&v) == 0);
  o_close(&o);
}

static int before_calls[8], before_err; /* what b_before saw, and answers */
static int b_before(void *ctx, unsigned type, uint64_t off, uint64_t len) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  int err;
  (void)off, (void)len;
  CHECK(ctx == &before_err && type < 8 && type != DISC);
  pthread_mutex_lock(&lock);
  before_calls[type]++;
  err = before_err;
  pthread_mutex_unlock(&lock);
  return err;
}

/* Each request is announced once, and is not done where that says no */
static void u_before(void) {
  static const int what[] = {READ, WRITE, FLUSH, TRIM, ZEROES, STATUS};
  static char b[2 << 20];
  struct nbdserve_config config = {0};
  static struct t_reply reply;
  int i, k, n, mode, memory;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.before = b_before;
  config.ctx = &before_err;
  for (memory = 0; memory < 2; memory++)
    for (mode = 0; mode < 3; mode++) {
      struct ram *r = r_new(sizeof b);
      struct nbdserve_export e = r_export(r, 0);
      struct served v = {0};
      struct nbdserve *s;
      struct t_conn c;
      if (memory) {
        memset(&e, 0, sizeof e);
        CHECK(nbdserve_flat_open("mem:2M", NULL, &e) == 0);
      }
      CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
      s_start(&v, s, &c);
      CHECK(t_open(&c, c.fd, "", mode) == 0);
      memset(before_calls, 0, sizeof before_calls);
      for (i = n = 0; i < COUNT(what); i++)
        for (k = 0; k < 3; k++) { /* of all sizes; the last is refused */
          uint32_t len = what[i] == FLUSH ? 0 : k == 1 ? sizeof b : 4096;
          int fua = what[i] == WRITE ? FUA : 0;
          if (what[i] == STATUS && mode == 0) continue;
          before_err = k == 2 ? -ENOSPC : 0;
          memset(b, i + k, sizeof b);
          CHECK(t_do(&c, fua, what[i], 0, len, b) == (k == 2 ? 28 : 0));
          CHECK(before_calls[what[i]] == k + 1);
          if (!memory) CHECK((k == 2) == (r->last == -1));
          r->last = -1;
        }
      before_err = 0;
      memset(b, 1, sizeof b);
      CHECK(t_do(&c, 0, WRITE, 0, sizeof b, b) == 0);
      before_err = -EIO;
      memset(b, 2, sizeof b);
      CHECK(t_do(&c, 0, WRITE, 0, sizeof b, b) == 5);
      before_err = 0;
      CHECK(t_do(&c, 0, READ, 0, sizeof b, b) == 0 && b[0] == 1);
      memset(before_calls, 0, sizeof before_calls);
      before_err = -ENOSPC;
      for (i = 0; i < 50; i++) /* together, but each is announced */
        CHECK(t_send(&c, 0, FLUSH, (uint32_t)i, 0, 0, NULL) == 0);
      for (i = 0; i < 50; i++)
        CHECK(t_recv(&c, &reply) && reply.error == 28);
      CHECK(before_calls[FLUSH] == 50);
      before_err = 0;
      t_close(&c);
      CHECK(s_end(&v) == 0);
      nbdserve_free(s);
    }
}

static void *h_serve(void *arg) {
  struct served *v = arg;
  v->result = nbdserve_serve(v->s, v->fd, v->result, NULL);
  return NULL;
}

/* Requests come by a pipe that stays open, replies go to a socket whose other
 * end is closed: there is no client any more. */
static void u_hangup(void) {
  struct nbdserve_config config = {0};
  struct served v = {0};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  unsigned char greeting[18], size[10];
  int in[2], out[2];
  config.version = NBDSERVE_VERSION_NUMBER;
  CHECK(nbdserve_new(&v.s, &config) == 0 && nbdserve_add(v.s, &e) == 0);
  CHECK(pipe(in) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, out) == 0);
  v.fd = in[0];
  v.result = out[0];
  CHECK(pthread_create(&v.thread, NULL, h_serve, &v) == 0);
  CHECK(t_read(out[1], greeting, sizeof greeting) == sizeof greeting);
  CHECK(write(in[1], "\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0", 20) == 20);
  CHECK(t_read(out[1], size, sizeof size) == sizeof size);
  t_sleep(50);
  close(out[1]);
  s_end(&v);
  close(in[0]);
  close(in[1]);
  close(out[0]);
  nbdserve_free(v.s);
}

static int b_slow_flush(void *ctx, unsigned type, uint64_t off, uint64_t len) {
  (void)off, (void)len;
  if (type == FLUSH) {
    while (t_hold(ctx, -1))
      t_sleep(1);
  }
  return 0;
}

/* A flush that takes no time, but whose announcement does, holds nothing up:
 * not after one that was done at once, either. */
static void u_slow_before(void) {
  struct nbdserve_config config = {0};
  static struct t_reply reply;
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  unsigned char all[3 * 28];
  char b[512];
  int i, k, hold = 0;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.before = b_slow_flush;
  config.ctx = &hold;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  for (k = 0; k < 3; k++) {
    t_hold(&hold, 1);
    for (i = 0; i < 3; i++) /* one that comes alone may hold others up */
      t_head(all + 28 * i, 0, FLUSH, (uint32_t)i, 0, 0);
    CHECK(t_write(c.fd, all, sizeof all) == 0);
    t_sleep(100);
    if (k > 0) {
      CHECK(t_send(&c, 0, READ, 9, 0, 512, NULL) == 0);
      CHECK(t_recv(&c, &reply) && (uint32_t)reply.cookie == 9);
    }
    t_hold(&hold, 0);
    for (i = 0; i < 3; i++)
      CHECK(t_recv(&c, &reply) && (uint32_t)reply.cookie < 3 && !reply.error);
    CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
  }
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

/* What depends on what was taken away is gone, too */
static void u_dependent(void) {
  struct nbdserve_config config = {0};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  static struct t_reply reply;
  unsigned char p[4200], h[4] = {0, 0, 0, 3};
  unsigned i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.without = 1 << 6; /* FAST_ZERO goes with WRITE_ZEROES */
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 1) == 0);
  CHECK((c.flags & (1 << 6 | 1 << 11)) == 0);
  CHECK(t_do(&c, FAST, ZEROES, 0, 512, NULL) == 22);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);

  r = r_new(65536); /* a payload of BLOCK_STATUS is for who was offered it */
  e = r_export(r, 0);
  for (i = 0; i < 2; i++) {
    config.without = i ? 1 << 12 : 0;
    if (i) e = r_export(r_new(65536), 0);
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", 2) == 0 && (c.flags >> 12 & 1) == 1u - i);
    t_head(p, PAYLOAD, STATUS, 1, 0, 12);
    t_put(p, 4, 0x21e41c71);
    t_put(p + 24, 8, 12);
    t_put(p + 32, 8, 4096);
    t_put(p + 40, 4, 1);
    CHECK(t_write(c.fd, p, 44) == 0 && t_recv(&c, &reply));
    CHECK(reply.error == (i ? 22 : 0) && reply.done);
    CHECK(t_do(&c, 0, STATUS, 0, 512, NULL) == 0);
    t_close(&c);
    CHECK(s_end(&v) == 0);
    nbdserve_free(s);
  }

  config.without = UINT32_C(0x10000) << 7; /* EXTENDED_HEADERS goes with GO */
  CHECK(nbdserve_new(&s, &config) == 0);
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, p, 18) == 18 && t_write(c.fd, h, 4) == 0);
  CHECK(t_option(c.fd, 11, "", 0) == 0 && t_answer(c.fd, p) == 0x80000001);
  CHECK(t_option(c.fd, 2, "", 0) == 0 && t_answer(c.fd, p) == 1);
  CHECK(s_end(&v) == 0);
  close(c.fd);
  nbdserve_free(s);
}

/* Whatever flags are taken away: what they expose is gone, the rest works */
static void u_without(void) {
  static const struct {
    int flag, command, flags;
  } gone[] = {{1 << 2, FLUSH, 0}, {1 << 3, WRITE, FUA},
              {1 << 5, TRIM, 0},  {1 << 6 | 1 << 11, ZEROES, 0},
              {1 << 7, READ, DF}, {1 << 11, ZEROES, FAST}};
  char b[512] = {0};
  int i, k;
  for (i = 0; i < COUNT(gone); i++) {
    struct nbdserve_config config = {0};
    struct ram *r = r_new(65536);
    struct nbdserve_export e = r_export(r, NBDSERVE_EXPORT_MULTI_CONN);
    struct served v = {0};
    struct nbdserve *s;
    struct t_conn c;
    config.version = NBDSERVE_VERSION_NUMBER;
    config.without = (uint32_t)gone[i].flag | 3; /* not these two */
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", 1) == 0);
    CHECK((int)c.flags == (0x9ed & ~(gone[i].flag)));
    for (k = 0; k < COUNT(gone); k++) {
      int error = t_do(&c, gone[k].flags, gone[k].command, 0,
                       gone[k].command == FLUSH ? 0 : 512, b);
      int is_gone = gone[i].flag & gone[k].flag ? 1 : 0;
      if (gone[k].flag == 1 << 11 && !is_gone)
        CHECK(error == 95);
      else if (gone[k].command == ZEROES && !gone[k].flags)
        CHECK((error == 22) == (gone[i].flag >> 6 & 1));
      else
        CHECK(error == (is_gone ? 22 : 0));
    }
    t_close(&c);
    CHECK(s_end(&v) == 0);
    nbdserve_free(s);
  }
  for (i = 3; i < 12; i++) { /* options */
    struct nbdserve_config config = {0};
    struct served v = {0};
    struct nbdserve *s;
    struct t_conn c;
    unsigned char p[4200], h[4] = {0, 0, 0, 3};
    config.version = NBDSERVE_VERSION_NUMBER;
    config.without = UINT32_C(0x10000) << i;
    CHECK(nbdserve_new(&s, &config) == 0);
    s_start(&v, s, &c);
    CHECK(t_read(c.fd, p, 18) == 18 && t_write(c.fd, h, 4) == 0);
    CHECK(t_option(c.fd, (uint32_t)i, "", 0) == 0);
    CHECK(t_answer(c.fd, p) == 0x80000001);
    CHECK(t_option(c.fd, 3, "", 0) == 0);
    CHECK(t_answer(c.fd, p) == (i == 3 ? 0x80000001 : 1));
    CHECK(t_option(c.fd, 2, "", 0) == 0 && t_answer(c.fd, p) == 1);
    CHECK(s_end(&v) == 0);
    close(c.fd);
    nbdserve_free(s);
  }
}

/* Writes that are temporary, against a copy in memory; the file stays */
static void u_temporary(void) {
  enum {
    SIZE = 1000003,
    OFF = 4097
  };
  static unsigned char want[SIZE], b[SIZE + OFF], file[SIZE + OFF];
  struct nbdserve_flat flat = {0};
  struct nbdserve_export e = {0}, other = {0};
  char path[200];
  uint32_t seed = t_seed();
  int round, mode, i, fd;
  snprintf(path, sizeof path, "%s/base", dir);
  for (i = 0; i < SIZE + OFF; i++)
    file[i] = (unsigned char)(i / 97);
  fd = open(path, O_RDWR | O_CREAT, 0600);
  CHECK(write(fd, file, sizeof file) == sizeof file && fchmod(fd, 0400) == 0);
  flat.flags = NBDSERVE_FLAT_TEMPORARY;
  flat.dir = "/no/such/directory";
  CHECK(nbdserve_flat_open(path, &flat, &e) == -ENOENT);
  for (round = 0; round < 2; round++) {
    struct one o;
    flat.dir = round ? dir : NULL;
    flat.offset = round ? OFF : 0;
    flat.size = round ? 0 : SIZE;
    CHECK(nbdserve_flat_open(path, &flat, &e) == 0 && e.size == SIZE);
    CHECK(nbdserve_flat_open(path, &flat, &other) == 0); /* may be shared */
    memcpy(want, file + flat.offset, SIZE);
    o_open(&o, &e, round + 1);
    CHECK(o.c.size == SIZE && (o.c.flags & ~0x1000u) == 0xded);
    for (i = 0; i < 600; i++) {
      uint32_t off, len;
      seed = seed * 1103515245 + 12345;
      off = seed >> 8;
      seed = seed * 1103515245 + 12345;
      len = seed >> 12;
      mode = (int)(seed >> 8 & 3);
      off %= SIZE;
      len %= i % 8 == 0 ? SIZE : i % 2 ? 5000 : 70000;
      if (i % 16 == 5) off -= off % 65536, len = 65536;
      if (len > SIZE - off) len = SIZE - off;
      if (!len) continue;
      if (mode == 0) {
        CHECK(t_do(&o.c, 0, READ, off, len, b) == 0);
        CHECK(!memcmp(b, want + off, len));
      } else if (mode == 1) {
        memset(want + off, 0, len);
        CHECK(t_do(&o.c, 0, ZEROES, off, len, NULL) == 0);
      } else {
        memset(want + off, i, len);
        CHECK(t_do(&o.c, FUA, WRITE, off, len, want + off) == 0);
      }
    }
    CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
    CHECK(t_do(&o.c, 0, TRIM, 0, 4096, NULL) == 0);
    CHECK(t_do(&o.c, 0, STATUS, 0, SIZE, NULL) == 0);
    CHECK(t_do(&o.c, FAST, ZEROES, 0, 4096, NULL) == 95);
    CHECK(t_do(&o.c, 0, READ, 4096, SIZE - 4096, b) == 0);
    CHECK(!memcmp(b, want + 4096, SIZE - 4096));
    o_close(&o);
    CHECK(other.ops->read(other.ctx, b, 0, SIZE, 0) == 0);
    CHECK(!memcmp(b, file + flat.offset, SIZE)); /* each has its own */
    other.ops->close(other.ctx);
    CHECK(pread(fd, b, sizeof b, 0) == sizeof b && !memcmp(b, file, sizeof b));
  }
  close(fd);
  for (i = 0; i < 3; i++) { /* the map of blocks is of the size it had */
    static const uint64_t sizes[] = {12345, 70000, 1 << 30};
    struct nbdserve *s;
    memset(&e, 0, sizeof e);
    CHECK(nbdserve_flat_open(path, &flat, &e) == 0);
    CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
    CHECK(nbdserve_resize(s, "", sizes[i]) == 0);
    CHECK(e.ops->size(e.ctx, sizes[i]) == (i < 2 ? sizes[i] : SIZE));
    nbdserve_free(s);
  }
}

/* A read error below is one of the request, and nothing is lost by it */
static void u_overerror(void) {
  struct nbdserve_flat flat = {.flags = NBDSERVE_FLAT_TEMPORARY};
  struct nbdserve_export e = {0};
  unsigned char b[65536], c[512];
  char path[200];
  struct one o;
  int fd;
  snprintf(path, sizeof path, "%s/base", dir);
  CHECK((fd = open(path, O_RDWR | O_CREAT, 0600)) >= 0);
  CHECK(ftruncate(fd, 262144) == 0);
  CHECK(nbdserve_flat_open(path, &flat, &e) == 0);
  o_open(&o, &e, 1);
  memset(b, 'w', sizeof b);
  CHECK(ftruncate(fd, 0) == 0); /* the kernel says that it is over */
  CHECK(t_do(&o.c, 0, READ, 0, 512, c) == 5);
  CHECK(t_do(&o.c, 0, WRITE, 100, 512, b) == 5); /* the rest is unknown */
  CHECK(t_do(&o.c, 0, WRITE, 65536, 65536, b) == 0);
  CHECK(t_do(&o.c, 0, READ, 65536, 512, c) == 0 && !memcmp(b, c, 512));
  CHECK(ftruncate(fd, 262144) == 0);
  CHECK(t_do(&o.c, 0, READ, 100, 512, c) == 0 && !c[0] && !c[511]);
  CHECK(t_do(&o.c, 0, WRITE, 100, 512, b) == 0);
  CHECK(t_do(&o.c, 0, READ, 0, 512, c) == 0 && !c[99] && c[100] == 'w');
  o_close(&o);
  close(fd);
}

/* A map that addresses cannot reach is refused, also if size_t has 32 bits: it
 * has a bit for each 64 KiB */
static void u_maplen(void) {
  const uint64_t one = 1;
  struct flat f = {0};
  f.size = one << 52;
  CHECK(flat_make_overlay(&f, dir, UINT32_MAX) == -EFBIG);
  f.size = INT64_MAX;
  CHECK(flat_make_overlay(&f, dir, UINT32_MAX) == -EFBIG);
  f.size = one << 29;
  CHECK(flat_make_overlay(&f, dir, 1024) == -EFBIG && !f.in_overlay);
  CHECK(flat_make_overlay(&f, dir, 1028) == 0 && f.in_overlay);
  NBDSERVE_FREE(f.in_overlay);
  close(f.overlay_fd);
}

/* A slice that is resized: the last offset in the file is one of off_t */
static void u_slice(void) {
  struct nbdserve_flat flat = {0};
  struct nbdserve_export e = {0};
  struct one o;
  char b[512];
  flat.offset = 4096;
  flat.size = 4096;
  CHECK(nbdserve_flat_open("mem:64K", &flat, &e) == 0 && e.size == 4096);
  CHECK(e.ops->size(e.ctx, 8192) == 8192);
  CHECK(e.ops->size(e.ctx, INT64_MAX) == INT64_MAX - 4096);
  e.size = INT64_MAX;
  o_open(&o, &e, 1);
  CHECK(o.c.size == INT64_MAX - 4096);
  CHECK(t_do(&o.c, 0, READ, 0, 512, b) == 0);
  CHECK(t_do(&o.c, 0, READ, o.c.size - 512, 512, b) == 5);
  o_close(&o);
}

static void u_deadline(void) {
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  struct timespec from, to;
  unsigned char b[100];
  int how, i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.handshake_ms = 300;
  config.stall_ms = 50;
  for (how = 0; how < 4; how++) {
    CHECK(nbdserve_new(&s, &config) == 0);
    clock_gettime(CLOCK_MONOTONIC, &from);
    s_start(&v, s, &c);
    CHECK(t_read(c.fd, b, 18) == 18);
    if (how == 1) CHECK(t_write(c.fd, "", 1) == 0);
    if (how >= 2) CHECK(t_write(c.fd, "\0\0\0\3IHAVEOPT", 12) == 0);
    for (i = 0; how == 3 && i < 100; i++) { /* a byte now and then */
      if (t_write(c.fd, &"\0\0\0\3\0\1\0\0"[i < 8 ? i : 7], 1)) break;
      t_sleep(50);
    }
    CHECK(t_read(c.fd, b, 1) == 0 && s_end(&v) != 0);
    clock_gettime(CLOCK_MONOTONIC, &to);
    CHECK(to.tv_sec - from.tv_sec < 4);
    if (how == 3) /* the deadline alone counts */
      CHECK((to.tv_sec - from.tv_sec) * 1000 +
                (to.tv_nsec - from.tv_nsec) / 1000000 >=
            290);
    close(c.fd);
    nbdserve_free(s);
  }
}

static void u_direct(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  char b[512] = "";
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  v.name = "none";
  s_start(&v, s, &c);
  CHECK(s_end(&v) == -ENOENT);
  v.name = "ram";
  s_start(&v, s, &c);
  CHECK(t_do(&c, 0, READ, 0, 1, b) == 0 && b[0] == 'r');
  t_close(&c);
  CHECK(s_end(&v) == 0);
  s_start(&v, s, &c);
  CHECK(t_write(c.fd, "GET / HTTP/1.0\r\nHost: x\r\n\r\n", 28) == 0);
  CHECK(s_end(&v) == -EPROTO);
  nbdserve_free(s);
}

static void u_stop(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct one o;
  pthread_t run;
  void *result;
  char b;
  o_open(&o, &e, 0);
  CHECK(t_do(&o.c, 0, READ, 0, 1, &b) == 0);
  nbdserve_wake(o.s);
  CHECK(nbdserve_run(o.s) == -EINTR);
  CHECK(pthread_create(&run, NULL, u_run, o.s) == 0);
  nbdserve_wake(o.s);
  CHECK(pthread_join(run, &result) == 0);
  CHECK((int)(intptr_t)result == -EINTR);
  CHECK(t_do(&o.c, 0, READ, 0, 1, &b) == 0); /* clients do not notice */
  CHECK(pthread_create(&run, NULL, u_run, o.s) == 0);
  nbdserve_stop(o.s);
  CHECK(pthread_join(run, &result) == 0 && result == NULL);
  CHECK(r->calls[FLUSH] == 1);
  CHECK(t_read(o.c.fd, &b, 1) == 0);
  (void)s_end(&o.v);
  nbdserve_free(o.s);
}

/* Listens on a socket and connects to it */
static int u_dial(struct nbdserve *s) /* again: NULL */
{
  struct sockaddr_un a = {0};
  char address[200];
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  a.sun_family = AF_UNIX;
  snprintf(a.sun_path, sizeof a.sun_path, "%s/s", dir);
  snprintf(address, sizeof address, "unix:%s", a.sun_path);
  CHECK(!s || nbdserve_listen(s, address) == 0);
  CHECK(connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
  return fd;
}

static int u_descriptors(void) {
  int fd, n = 0;
  for (fd = 0; fd < 500; fd++)
    n += fcntl(fd, F_GETFD) >= 0;
  return n;
}

/* nbdserve_free while clients are still served */
static void u_free(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  struct t_conn c;
  static struct t_reply reply;
  pthread_t run;
  void *result;
  char b[512];
  int round, before = u_descriptors();
  for (round = 0; round < 4; round++) { /* one that waits, or has asked */
    r->blocks_ms = r->closes = 0;
    CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
    c.fd = u_dial(s);
    CHECK(pthread_create(&run, NULL, u_run, s) == 0);
    CHECK(t_open(&c, c.fd, "", round & 1) == 0);
    CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
    r->blocks_ms = 50;
    if (round & 2) CHECK(t_send(&c, 0, READ, 7, 0, 512, NULL) == 0);
    nbdserve_wake(s);
    CHECK(pthread_join(run, &result) == 0);
    CHECK((int)(intptr_t)result == -EINTR && r->closes == 0);
    nbdserve_free(s);
    CHECK(r->closes == 1);
    if (round & 2) {
      CHECK(t_recv(&c, &reply) && !reply.error);
      CHECK((uint32_t)reply.cookie == 7);
    }
    CHECK(t_read(c.fd, b, 1) == 0);
    close(c.fd);
    CHECK(u_descriptors() == before);
  }
}

/* Who leaves something half done is dropped, who is idle is not */
enum {
  S_IDLE,
  S_HEAD,
  S_TRICKLE,
  S_PAYLOAD,
  S_DRIBBLE,
  S_UNREAD,
  S_WAYS
};

/* Begins a request in that way and does not go on with it, or hardly */
static void s_halfway(struct t_conn *c, int how, char *b, size_t size) {
  unsigned char h[32];
  int mode = how % 3, i;
  t_head(h, 0, WRITE, 1, 0, how == S_DRIBBLE ? size : 4096);
  if (mode == 2) {
    memcpy(h, "\x21\xe4\x1c\x71\0\40", 6);
    t_put(h + 24, 8, how == S_DRIBBLE ? size : 4096);
  }
  if (how == S_HEAD) CHECK(t_write(c->fd, h, 11) == 0);
  if (how == S_PAYLOAD) CHECK(t_write(c->fd, h, 28) == 0);
  if (how == S_PAYLOAD) CHECK(t_write(c->fd, b, 3000) == 0);
  for (i = 0; how == S_TRICKLE && i < 100; i++) {
    if (t_write(c->fd, i < 32 ? (char *)h + i : b, 1)) break;
    t_sleep(20);
  }
  CHECK(how != S_TRICKLE || i < 100); /* while it still sends */
  if (how == S_DRIBBLE) CHECK(t_write(c->fd, h, mode == 2 ? 32 : 28) == 0);
  for (i = 0; how == S_DRIBBLE && i < 300; i++) {
    if (t_write(c->fd, b, 1000)) break;
    t_sleep(10);
  }
  CHECK(how != S_DRIBBLE || i < 300);
  for (i = 0; how == S_UNREAD && i < 32; i++)
    CHECK(t_send(c, 0, READ, 1, 0, size, NULL) == 0);
}

static void *s_each_halfway(void *unused) {
  static char b[4 << 20];
  struct nbdserve_config config = {0};
  struct ram *r = r_new(sizeof b);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  pthread_t run;
  int how, mode, i;
  (void)unused;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 200;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  for (how = S_IDLE; how < S_WAYS; how++) {
    struct t_conn c;
    struct t_reply reply = {0};
    struct nbdserve_stats t;
    mode = how % 3;
    c.fd = u_dial(how != S_IDLE ? NULL : s);
    if (how == S_IDLE) CHECK(pthread_create(&run, NULL, u_run, s) == 0);
    CHECK(t_open(&c, c.fd, "", mode) == 0);
    s_halfway(&c, how, b, sizeof b);
    for (i = 0; i < 100; i++) {
      t_sleep(20);
      nbdserve_stats(s, &t);
      if (!t.clients_now) break;
      if (how == S_IDLE && i == 40) { /* all is well with it */
        CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
        t_close(&c);
      }
    }
    CHECK(t.clients_now == 0);
    if (how != S_IDLE) close(c.fd);
    free(reply.data);
  }
  nbdserve_stop(s);
  CHECK(pthread_join(run, NULL) == 0);
  nbdserve_free(s);
  return NULL;
}

/* The time of a request begins with its first byte, not with the last reply */
static void *s_each_in_time(void *unused) {
  static char b[4 << 20];
  struct nbdserve_config config = {0};
  struct nbdserve_export e;
  struct nbdserve *s;
  int how, mode;
  (void)unused;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 200;
  for (mode = 0; mode < 3; mode++) {
    struct served v = {0};
    struct t_conn c;
    struct t_reply reply;
    unsigned char h[32];
    e = r_export(r_new(sizeof b), 0);
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", mode) == 0);
    t_head(h, 0, WRITE, 1, 0, 4096);
    if (mode == 2) memcpy(h, "\x21\xe4\x1c\x71\0\40", 6);
    if (mode == 2) t_put(h + 24, 8, 4096);
    for (how = 0; how < 2; how++) {
      t_sleep(300);
      CHECK(t_write(c.fd, h, 11) == 0);
      t_sleep(20);
      CHECK(t_write(c.fd, h + 11, mode == 2 ? 21 : 17) == 0);
      t_sleep(20);
      CHECK(t_write(c.fd, b, 4096) == 0);
      CHECK(t_recv(&c, &reply) && !reply.error);
    }
    CHECK(t_write(c.fd, h, mode ? 11 : 28) == 0 && t_read(c.fd, b, 1) == 0);
    CHECK(s_end(&v) == -ETIMEDOUT);
    close(c.fd);
    nbdserve_free(s);
  }
  return NULL;
}

/* Who needs longer for a long request than a short one may take, but less for
 * each MiB, stays: in either direction */
static void *s_each_steady(void *unused) {
  static char b[4 << 20];
  struct nbdserve_config config = {0};
  struct ram *r = r_new(sizeof b);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  struct t_reply reply;
  int i;
  (void)unused;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 600;
  memset(&reply, 0, sizeof reply);
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  t_head((unsigned char *)b, 0, WRITE, 1, 0, sizeof b);
  CHECK(t_write(c.fd, b, 28) == 0);
  for (i = 0; i < 4; i++) {
    t_sleep(250);
    CHECK(t_write(c.fd, b + (i << 20), 1 << 20) == 0);
  }
  CHECK(t_recv(&c, &reply) && !reply.error);
  CHECK(t_send(&c, 0, READ, 1, 0, sizeof b, NULL) == 0);
  CHECK(t_read(c.fd, b, 16) == 16);
  for (i = 0; i < 4; i++) {
    t_sleep(250);
    CHECK(t_read(c.fd, b, 1 << 20) == 1 << 20);
  }
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
  return NULL;
}

/* A client whose replies come through a pipe, and who takes them in sips: each
 * makes room for some more, unlike with a socket and its large buffer */
struct sipper {
  struct nbdserve *s;
  pthread_t thread;
  int in[2], out[2];
  int result;
};

static void *sip_serve(void *arg) {
  struct sipper *p = arg;
  p->result = nbdserve_serve(p->s, p->in[0], p->out[1], "ram");
  close(p->out[1]);
  return NULL;
}

/* Sends n READs of len bytes */
static void sip_start(struct sipper *p, struct nbdserve *s, int n,
                      uint32_t len) {
  struct nbdserve_stats t;
  unsigned char h[32];
  p->s = s;
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, p->in) == 0 && pipe(p->out) == 0);
  CHECK(pthread_create(&p->thread, NULL, sip_serve, p) == 0);
  t_head(h, 0, READ, 1, 0, len);
  while (n-- > 0)
    CHECK(t_write(p->in[1], h, 28) == 0);
  do {
    t_sleep(1);
    nbdserve_stats(s, &t);
  } while (!t.clients_now);
}

/* Takes 4096 bytes every pause ms: how many ms until the server has given up,
 * or limit */
static int sip(struct sipper *p, int pause, int limit) {
  struct nbdserve_stats t;
  struct pollfd ready = {p->out[0], POLLIN, 0};
  char b[4096];
  int ms;
  for (ms = 0; ms < limit; ms += pause) {
    nbdserve_stats(p->s, &t);
    if (!t.clients_now) break;
    CHECK(poll(&ready, 1, 3000) == 1); /* else it hangs */
    CHECK(read(p->out[0], b, sizeof b) > 0);
    t_sleep(pause);
  }
  return ms;
}

static int sip_end(struct sipper *p) {
  close(p->in[1]);
  close(p->out[0]);
  CHECK(pthread_join(p->thread, NULL) == 0);
  close(p->in[0]);
  return p->result;
}

static void s_sip(uint32_t len) {
  struct nbdserve_config config = {0};
  struct nbdserve_export e = r_export(r_new(4 << 20), 0);
  struct nbdserve *s;
  struct sipper p;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 200;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  sip_start(&p, s, 1, len);
  CHECK(sip(&p, 20, 3000) < 3000);
  CHECK(sip_end(&p) == -ETIMEDOUT);
  nbdserve_free(s);
}

/* Who takes a long reply in sips gains nothing by it: the time counts for the
 * whole, it does not begin anew with each of them */
static void *s_each_sip(void *unused) {
  s_sip(4 << 20);
  return unused;
}

/* The same for a reply that a worker sends: the client's thread, which waits
 * for the next request, has to learn of it */
static void u_sipworker(void) {
  s_sip(1 << 20);
}

static void u_stalls(void) { /* they mostly wait: at the same time */
  static void *(*const parts[])(void *) = {s_each_halfway, s_each_in_time,
                                           s_each_steady, s_each_sip};
  pthread_t t[4];
  int i;
  for (i = 0; i < 4; i++)
    CHECK(!pthread_create(&t[i], NULL, parts[i], NULL));
  for (i = 0; i < 4; i++)
    CHECK(!pthread_join(t[i], NULL));
}

/* What was sent before nbdserve_stop is answered */
static void u_inflight(void) {
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  struct t_conn c;
  static struct t_reply reply;
  pthread_t run;
  void *result;
  int i, fd;
  r->blocks_ms = 5;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  fd = u_dial(s);
  CHECK(pthread_create(&run, NULL, u_run, s) == 0);
  CHECK(t_open(&c, fd, "", 1) == 0);
  for (i = 0; i < 100; i++)
    CHECK(t_send(&c, 0, READ, (uint32_t)i, 0, 512, NULL) == 0);
  nbdserve_stop(s);
  for (i = 0; i < 100; i++)
    CHECK(t_recv(&c, &reply) && !reply.error);
  CHECK(!t_recv(&c, &reply));
  CHECK(pthread_join(run, &result) == 0 && result == NULL);
  nbdserve_free(s);
  close(fd);
}

/* Requests that exceed what may wait for a backend are done nevertheless */
static void u_memory(void) {
  struct nbdserve_config config = {0};
  struct ram *r = r_new(4 << 20);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  static struct t_reply reply;
  unsigned char *b = t_alloc(4 << 20);
  int i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.threads = 2;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  for (i = 0; i < 4; i++)
    CHECK(t_send(&c, 0, READ, (uint32_t)i, 0, 1 << 19, NULL) == 0);
  for (i = 0; i < 4; i++)
    CHECK(t_recv(&c, &reply) && !reply.error);
  CHECK(t_do(&c, 0, WRITE, 0, 4 << 20, b) == 0 && r->data[(4 << 20) - 1] == 0);
  CHECK(t_do(&c, 0, READ, 0, 4 << 20, b) == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

static void u_two(void) {
  struct ram *r[2];
  struct nbdserve_export e;
  struct one o[2];
  struct nbdserve_stats stats;
  char b[512] = "", i;
  for (i = 0; i < 2; i++) {
    e = r_export(r[(int)i] = r_new(4096u << i), 0);
    o_open(&o[(int)i], &e, i);
  }
  CHECK(o[0].c.size == 4096 && o[1].c.size == 8192);
  CHECK(t_do(&o[0].c, 0, WRITE, 0, 512, b) == 0);
  CHECK(t_do(&o[0].c, 0, READ, 0, 100, b) == 0);
  CHECK(t_do(&o[0].c, 0, READ, 4096, 1, b) == 22);
  CHECK(t_do(&o[0].c, 0, FLUSH, 0, 0, NULL) == 0);
  CHECK(r[0]->data[0] == 0 && r[1]->data[0] == 'r');
  nbdserve_stats(o[0].s, &stats);
  CHECK(stats.clients == 1 && stats.clients_now == 1 && stats.requests == 4);
  CHECK(stats.errors == 1 && stats.bytes_read == 100 && stats.flushes == 1);
  CHECK(stats.bytes_written == 512);
  nbdserve_stats(o[1].s, &stats);
  CHECK(stats.requests == 0);
  o_close(&o[0]);
  CHECK(t_do(&o[1].c, 0, READ, 8000, 192, b) == 0);
  o_close(&o[1]);
}

/* ---- the store ---- */

static void h_is(int hw, const char *text, size_t times, const char *want) {
  size_t n = strlen(text), i;
  unsigned char *p = t_alloc(n * times + 1), out[2][32];
  char hex[65];
  int k;
  for (i = 0; i < times; i++)
    memcpy(p + i * n, text, n);
  for (k = 0; k < 2; k++) {
    sha_256(hw, p, k ? p : NULL, n * times, out[0], out[1]);
    if (k) CHECK(memcmp(out[0], out[1], 32) == 0);
    for (i = 0; i < 32; i++)
      snprintf(hex + 2 * i, 3, "%02x", out[0][i]);
    CHECK(strcmp(hex, want) == 0);
  }
}

static void u_fips(void) { /* the examples of FIPS 180-4 */
  int hw;
  for (hw = 0; hw <= os_has_hwsha(); hw++) {
    h_is(hw, "", 1,
         "e3b0c44298fc1c149afbf4c8996fb924"
         "27ae41e4649b934ca495991b7852b855");
    h_is(hw, "abc", 1,
         "ba7816bf8f01cfea414140de5dae2223"
         "b00361a396177a9cb410ff61f20015ad");
    h_is(hw, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    h_is(hw,
         "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmn"
         "hijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
         1, "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
    h_is(hw, "a", 1000000,
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

static uint32_t h_next(uint32_t *x) {
  return (*x = *x * 1664525 + 1013904223) >> 8;
}

/* All ways to compute it agree, wherever the messages lie */
static void u_ways(void) {
  unsigned char *p = t_alloc(70100), *q = t_alloc(70100), out[5][32];
  uint32_t x = 1, i, len;
  for (i = 0; i < 70100; i++)
    p[i] = (unsigned char)h_next(&x);
  for (i = 0; i < 70100; i++)
    q[i] = (unsigned char)h_next(&x);
  for (i = 0; i < 400; i++) {
    const unsigned char *a = p + i % 7, *b = q + i % 5;
    int hw;
    len = i <= 300 ? i : h_next(&x) % 70001;
    sha_256(0, a, NULL, len, out[0], NULL);
    sha_256(0, b, NULL, len, out[1], NULL);
    CHECK(!len || memcmp(out[0], out[1], 32) != 0);
    for (hw = 0; hw <= os_has_hwsha(); hw++) {
      sha_256(hw, a, b, len, out[2], out[3]);
      sha_256(hw, a, NULL, len, out[4], NULL);
      CHECK(memcmp(out[0], out[2], 64) == 0);
      CHECK(memcmp(out[0], out[4], 32) == 0);
    }
  }
}

/* Writers share each block of a volume, a quarter each, while others read,
 * flush, verify, and make and remove snapshots and clones. */
enum {
  K_BLOCKS = 64,
  K_CELL = 1024,
  K_WRITERS = 4,
  K_TURNS = 1500
};
static struct nbdserve_cas *k_store;
static unsigned char k_last[K_WRITERS][K_BLOCKS];
static int k_over; /* (t_hold) */

static void k_open(const char *name, struct nbdserve_export *e) {
  memset(e, 0, sizeof *e);
  CHECK(nbdserve_cas_volume(k_store, name, e) == 0);
}

static void *k_write(void *arg) {
  static const unsigned char zeroes[K_CELL];
  int me = (int)(intptr_t)arg, i;
  uint32_t x = (uint32_t)me + 7, b, to;
  unsigned char cell[K_CELL];
  struct nbdserve_export e;
  k_open("v", &e);
  for (i = 0; i < K_TURNS; i++) {
    uint64_t off;
    b = h_next(&x) % K_BLOCKS;
    off = b * 4096 + (uint64_t)me * K_CELL;
    to = h_next(&x) % 50; /* 0: zeroes; some blocks become equal */
    memset(cell, to ? (int)to * 4 + me : 0, K_CELL);
    if (to)
      CHECK(e.ops->write(e.ctx, cell, off, K_CELL, 0) == 0);
    else
      CHECK(e.ops->zero(e.ctx, off, K_CELL, 0) == 0);
    k_last[me][b] = cell[0];
    if (i % 100 == 0) CHECK(e.ops->flush(e.ctx, 0) == 0);
    CHECK(e.ops->read(e.ctx, cell, off, K_CELL, 0) == 0);
    CHECK(cell[0] == k_last[me][b] && !memcmp(cell, cell + 1, K_CELL - 1));
    CHECK(to || memcmp(cell, zeroes, K_CELL) == 0);
  }
  e.ops->close(e.ctx);
  return NULL;
}

/* What is read of a volume is whole cells of their writers. */
static void k_sound(const char *name, int last) {
  unsigned char b[4096];
  struct nbdserve_export e;
  int i, k;
  k_open(name, &e);
  for (i = 0; i < K_BLOCKS; i++) {
    CHECK(e.ops->read(e.ctx, b, (uint64_t)i * 4096, 4096, 0) == 0);
    for (k = 0; k < K_WRITERS; k++) {
      const unsigned char *c = b + k * K_CELL;
      if (c[0]) CHECK(c[0] % 4 == k);
      if (last) CHECK(c[0] == k_last[k][i]);
    }
  }
  e.ops->close(e.ctx);
}

static int k_damage(void *arg, const char *name, uint64_t off, uint64_t len,
                    const char *why) {
  (void)arg, (void)name, (void)off, (void)len;
  t_fail(__LINE__, why);
  return 0;
}

static int k_listed(void *arg, const struct nbdserve_cas_info *info) {
  CHECK(info->size == K_BLOCKS * 4096);
  ++*(int *)arg;
  return 0;
}

static void *k_look(void *arg) {
  struct nbdserve_cas_stat st;
  (void)arg;
  while (!t_hold(&k_over, -1)) {
    int n = 0;
    k_sound("v", 0);
    CHECK(nbdserve_cas_verify(k_store, k_damage, NULL, NULL) == 0);
    CHECK(nbdserve_cas_list(k_store, k_listed, &n) == 0 && n > 0);
    nbdserve_cas_stat(k_store, &st);
  }
  return NULL;
}

static void k_remove(const char *name) {
  int err;
  while ((err = nbdserve_cas_rm(k_store, name)) == -EBUSY)
    t_sleep(1);
  CHECK(err == 0); /* busy: it was being verified */
}

static int k_range(void *arg, uint64_t off, uint64_t len) {
  CHECK(off % 4096 == 0 && len % 4096 == 0 && len > 0);
  ++*(int *)arg;
  return 0;
}

static void *k_change(void *arg) {
  char id[72], other[72];
  (void)arg;
  while (!t_hold(&k_over, -1)) {
    int n = 0;
    CHECK(nbdserve_cas_snapshot(k_store, "v@s") == 0);
    k_sound("v@s", 0);
    CHECK(nbdserve_cas_seal(k_store, "v@s", id, NULL, NULL) == 0);
    CHECK(nbdserve_cas_clone(k_store, id, "c") == 0);
    CHECK(nbdserve_cas_diff(k_store, "c", "v@s", k_range, &n) == 0 && n == 0);
    CHECK(nbdserve_cas_diff(k_store, "v", "v@s", k_range, &n) == 0);
    CHECK(nbdserve_cas_snapshot(k_store, "c@s") == 0);
    CHECK(nbdserve_cas_seal(k_store, "c@s", other, NULL, NULL) == 0);
    CHECK(!strcmp(id, other));
    k_remove("c@s");
    k_remove("v@s");
    k_sound("c", 0);
    CHECK(nbdserve_cas_rename(k_store, "c", "d") == 0);
    k_remove("d");
  }
  return NULL;
}

static void u_together(void) {
  struct nbdserve_cas_options o = {0};
  pthread_t t[K_WRITERS + 2];
  char path[500];
  int i;
  o.log_pages = 8;
  snprintf(path, sizeof path, "%s/together", dir);
  CHECK(nbdserve_cas_init(path, &o) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &k_store) == 0);
  CHECK(nbdserve_cas_create(k_store, "v", K_BLOCKS * 4096) == 0);
  for (i = 0; i < K_WRITERS + 2; i++)
    CHECK(pthread_create(t + i, NULL,
                         i < K_WRITERS    ? k_write
                         : i == K_WRITERS ? k_look
                                          : k_change,
                         (void *)(intptr_t)i) == 0);
  for (i = 0; i < K_WRITERS + 2; i++) {
    if (i == K_WRITERS) t_hold(&k_over, 1);
    pthread_join(t[i], NULL);
  }
  k_sound("v", 1);
  CHECK(nbdserve_cas_close(k_store) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &k_store) == 0);
  k_sound("v", 1);
  CHECK(nbdserve_cas_verify(k_store, k_damage, NULL, NULL) == 0);
  CHECK(nbdserve_cas_close(k_store) == 0);
}

/* A store in the file of that name, or its volume or snapshot */
static struct nbdserve_cas *q_open(const char *path, uint32_t flags) {
  struct nbdserve_cas_options o = {0};
  struct nbdserve_cas *cas = NULL;
  o.flags = flags;
  CHECK(nbdserve_cas_open(path, &o, &cas) == 0);
  return cas;
}

static struct nbdserve_cas *q_new(char path[500], const char *name,
                                  uint32_t block_size) {
  struct nbdserve_cas_options o = {0};
  o.log_pages = 64;
  o.block_size = block_size;
  snprintf(path, 500, "%s/%s", dir, name);
  CHECK(nbdserve_cas_init(path, &o) == 0);
  return q_open(path, 0);
}

static void q_put(struct nbdserve_cas *cas, const char *name, uint64_t off,
                  uint64_t len, int byte) {
  struct nbdserve_export e = {0};
  unsigned char *b = malloc((size_t)len);
  CHECK(b != NULL);
  memset(b, byte, (size_t)len);
  CHECK(nbdserve_cas_volume(cas, name, &e) == 0);
  CHECK(e.ops->write(e.ctx, b, off, len, 0) == 0);
  e.ops->close(e.ctx);
  free(b);
}

static int q_get(struct nbdserve_cas *cas, const char *name, uint64_t off,
                 uint64_t len, void *b) {
  struct nbdserve_export e = {0};
  int err = nbdserve_cas_volume(cas, name, &e);
  if (err) return err;
  err = e.ops->read(e.ctx, b, off, len, 0);
  e.ops->close(e.ctx);
  return err;
}

/* Seals name@s of a new snapshot, and forgets it */
static void q_seal(struct nbdserve_cas *cas, const char *name, char id[72]) {
  char snapshot[20], again[72];
  snprintf(snapshot, sizeof snapshot, "%s@s", name);
  CHECK(nbdserve_cas_snapshot(cas, snapshot) == 0);
  CHECK(nbdserve_cas_seal(cas, snapshot, id, NULL, NULL) == 0);
  CHECK(strlen(id) == 71 && strspn(id + 7, "0123456789abcdef") == 64);
  CHECK(nbdserve_cas_seal(cas, snapshot, again, NULL, NULL) == 0);
  CHECK(!strcmp(id, again));
  CHECK(nbdserve_cas_rm(cas, snapshot) == 0);
}

static int q_listed(void *arg, const struct nbdserve_cas_info *info) {
  char *all = arg;
  snprintf(all + strlen(all), 900 - strlen(all), "%s=%.9s ", info->name,
           info->id);
  return 0;
}

static const char *q_ids(struct nbdserve_cas *cas) {
  static char all[900];
  all[0] = 0;
  CHECK(nbdserve_cas_list(cas, q_listed, all) == 0);
  return all;
}

static int q_find(void *ctx, const char *name, struct nbdserve_export *out) {
  return nbdserve_cas_volume(ctx, name, out);
}

/* The id is of the content: not of how it came there */
static void u_ids(void) {
  static const char want[] =
      "sha256-"
      "e329ac1005f8a4e4157f5d29d35b207bd23cf271f60e90b1b64ff69ef66e4b29";
  static const char longer[] =
      "sha256-"
      "378c96b374d630ded1fc8f5a09465683ac351e155318d7f70a221d2cd8ccd7e1";
  static const char wide[] = /* with holes between its leaves */
      "sha256-"
      "680c399284258c497d8df53d908d2310b30ac5fd54b3bc80474cd278f3bf4025";
  char path[500], other[500], id[72], seen[12][72];
  struct nbdserve_cas *cas = q_new(path, "ids", 0), *two;
  int i, n = 0;

  CHECK(nbdserve_cas_create(cas, "v", 8292) == 0);
  q_put(cas, "v", 0, 4096, 'a');
  q_put(cas, "v", 8192, 100, 'b');
  q_seal(cas, "v", seen[n++]);
  CHECK(strcmp(seen[0], want) == 0);
  q_put(cas, "v", 8291, 1, 'c'); /* its last byte */
  q_seal(cas, "v", seen[n++]);
  q_put(cas, "v", 8291, 1, 'b');
  q_put(cas, "v", 4096, 1, 'x');
  q_seal(cas, "v", seen[n++]);
  q_put(cas, "v", 4096, 1, 0);
  q_put(cas, "v", 0, 4096, 'b');
  q_seal(cas, "v", seen[n++]);
  q_put(cas, "v", 0, 4096, 'a');
  CHECK(nbdserve_cas_resize(cas, "v", 8293) == 0); /* a zero more */
  q_seal(cas, "v", seen[n++]);
  CHECK(nbdserve_cas_resize(cas, "v", 0) == 0);
  q_seal(cas, "v", seen[n++]);
  CHECK(nbdserve_cas_resize(cas, "v", 301 * 4096) == 0);
  q_seal(cas, "v", seen[n++]);
  q_put(cas, "v", 0, 4096, 'a');
  q_put(cas, "v", 300 * 4096, 4096, 'c');
  q_seal(cas, "v", seen[n++]);
  CHECK(strcmp(seen[n - 1], longer) == 0);
  CHECK(nbdserve_cas_resize(cas, "v", 5000 * 4096 + 1) == 0);
  q_put(cas, "v", 1016 * 4096, 4096, 'd');
  q_put(cas, "v", 5000 * 4096, 1, 'f');
  q_seal(cas, "v", seen[n++]);
  CHECK(strcmp(seen[n - 1], wide) == 0);

  /* another order, other garbage, copies, what is behind the end */
  two = q_new(other, "ids2", 0);
  CHECK(nbdserve_cas_create(two, "w", 40960) == 0);
  for (i = 0; i < 20; i++)
    q_put(two, "w", (uint64_t)i * 2048, 2048, 'A' + i);
  CHECK(nbdserve_cas_snapshot(two, "w@old") == 0);
  q_put(two, "w", 4096, 4096, 0);
  q_put(two, "w", 8192, 4096, 'b');
  q_put(two, "w", 0, 8192, 'a');
  q_put(two, "w", 4096, 4096, 0);
  CHECK(nbdserve_cas_resize(two, "w", 8292) == 0);
  q_seal(two, "w", id);
  CHECK(strcmp(id, want) == 0);
  CHECK(nbdserve_cas_close(two) == 0);
  two = q_new(other, "ids3", 8192); /* another block size */
  CHECK(nbdserve_cas_create(two, "v", 8292) == 0);
  q_put(two, "v", 0, 4096, 'a');
  q_put(two, "v", 8192, 100, 'b');
  q_seal(two, "v", seen[n++]);
  CHECK(nbdserve_cas_close(two) == 0);
  for (i = 0; i < n * n; i++)
    CHECK(i / n == i % n || strcmp(seen[i / n], seen[i % n]) != 0);
  CHECK(nbdserve_cas_close(cas) == 0);
}

static int q_no_more(void *arg, uint64_t done, uint64_t total) {
  return (void)arg, done <= total;
}

/* The snapshot of that id is found by it, over NBD, too; errors */
/* A client finds a sealed snapshot by its id, and keeps it from being removed
 */
static void q_serve_sealed(struct nbdserve_cas *cas, const char *a) {
  struct nbdserve_config config = {0};
  unsigned char data[8192];
  struct nbdserve *s;
  struct served v;
  struct t_conn c;
  int fd, i;

  config.version = NBDSERVE_VERSION_NUMBER;
  config.find = q_find;
  config.ctx = cas;
  CHECK(nbdserve_new(&s, &config) == 0);
  memset(&v, 0, sizeof v);
  s_start(&v, s, &c);
  fd = c.fd;
  CHECK(t_open(&c, fd, a, 1) == 0 && c.size == 8192 && (c.flags & 2));
  CHECK(t_do(&c, 0, READ, 0, 8192, (char *)data) == 0);
  for (i = 0; i < 8192; i++)
    CHECK(data[i] == (i < 4096 ? 'a' : 0));
  CHECK(nbdserve_cas_rm(cas, a) == -EBUSY);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

static void u_seal(void) {
  char path[500], id[72], a[72], b[72], other[500];
  struct nbdserve_cas *cas = q_new(path, "seal", 0), *large;
  unsigned char data[8192];

  CHECK(nbdserve_cas_create(cas, "v", 8192) == 0);
  q_put(cas, "v", 0, 4096, 'a');
  CHECK(nbdserve_cas_seal(cas, "v", id, NULL, NULL) == -EINVAL && !*id);
  CHECK(nbdserve_cas_seal(cas, "v@no", id, NULL, NULL) == -ENOENT);
  CHECK(nbdserve_cas_snapshot(cas, "v@s") == 0);
  q_put(cas, "v", 0, 4096, 'b');
  CHECK(nbdserve_cas_snapshot(cas, "v@t") == 0);
  CHECK(!strcmp(q_ids(cas), "v= v@s= v@t= "));
  CHECK(nbdserve_cas_seal(cas, "v@s", id, q_no_more, cas) == -ECANCELED);
  CHECK(!*id && !strcmp(q_ids(cas), "v= v@s= v@t= "));
  CHECK(nbdserve_cas_seal(cas, "v@s", a, NULL, NULL) == 0);
  CHECK(nbdserve_cas_seal(cas, "v@t", b, NULL, NULL) == 0 && strcmp(a, b) != 0);
  CHECK(nbdserve_cas_seal(cas, a, id, NULL, NULL) == 0 && !strcmp(id, a));
  snprintf(other, sizeof other, "v= v@s=%.9s v@t=%.9s ", a, b);
  CHECK(!strcmp(q_ids(cas), other));
  q_put(cas, "v", 0, 8192, 'c');
  CHECK(q_get(cas, a, 0, 1, data) == 0 && data[0] == 'a');
  CHECK(q_get(cas, b, 0, 1, data) == 0 && data[0] == 'b');

  q_serve_sealed(cas, a);
  CHECK(nbdserve_cas_create(cas, a, 1) < 0); /* not names to give */
  large = q_new(other, "large", 65536);
  CHECK(nbdserve_cas_create(large, "v", UINT64_MAX) == -EINVAL);
  CHECK(nbdserve_cas_create(large, "v", (uint64_t)INT64_MAX + 1) == -EINVAL);
  CHECK(nbdserve_cas_create(large, "v", INT64_MAX) == 0);
  CHECK(nbdserve_cas_resize(large, "v", (uint64_t)INT64_MAX + 1) == -EINVAL);
  CHECK(nbdserve_cas_close(large) == 0);
  CHECK(nbdserve_cas_rename(cas, "v", "sha256-1") == -EINVAL);
  snprintf(other, sizeof other, "%s@x", a);
  CHECK(nbdserve_cas_snapshot(cas, other) == -EINVAL);
  CHECK(nbdserve_cas_clone(cas, a, "c") == 0); /* a clone has none */
  CHECK(q_get(cas, "c", 0, 1, data) == 0 && data[0] == 'a');
  CHECK(nbdserve_cas_rename(cas, "v", "w") == 0); /* it follows a rename */
  CHECK(nbdserve_cas_close(cas) == 0);
  cas = q_open(path, 0);
  snprintf(other, sizeof other, "w= w@s=%.9s w@t=%.9s c= ", a, b);
  CHECK(!strcmp(q_ids(cas), other));
  CHECK(nbdserve_cas_rollback(cas, a) == 0); /* a volume has none */
  CHECK(nbdserve_cas_snapshot(cas, "w@u") == 0);
  CHECK(nbdserve_cas_seal(cas, "w@u", id, NULL, NULL) == 0 && !strcmp(id, a));
  CHECK(nbdserve_cas_snapshot(cas, "w@no") == 0);
  CHECK(nbdserve_cas_close(cas) == 0);
  cas = q_open(path, NBDSERVE_CAS_READONLY);
  CHECK(nbdserve_cas_seal(cas, "w@no", id, NULL, NULL) == -EROFS && !*id);
  CHECK(nbdserve_cas_seal(cas, "w@s", id, NULL, NULL) == 0 && !strcmp(id, a));
  CHECK(q_get(cas, a, 0, 1, data) == 0 && data[0] == 'a');
  CHECK(nbdserve_cas_close(cas) == 0);
  cas = q_open(path, 0);
  CHECK(nbdserve_cas_rm(cas, a) == -EINVAL); /* which one of two? */
  CHECK(nbdserve_cas_rm(cas, "w@u") == 0);
  CHECK(q_get(cas, a, 0, 1, data) == 0 && data[0] == 'a');
  CHECK(nbdserve_cas_rm(cas, a) == 0);
  CHECK(q_get(cas, a, 0, 1, data) == -ENOENT);
  snprintf(other, sizeof other, "w= w@t=%.9s c= w@no= ", b);
  CHECK(!strcmp(q_ids(cas), other));
  CHECK(nbdserve_cas_close(cas) == 0);
}

/* The store's own view of its slots */
static void q_check(struct nbdserve_cas *cas) {
#ifdef CAS_CHECK
  cas_check(cas);
#else
  (void)cas;
#endif
}

/* What a store has in use and free, when nothing waits to become free */
static struct nbdserve_cas_stat q_idle(struct nbdserve_cas *cas) {
  struct nbdserve_cas_stat stat;
  uint64_t bytes;
  int i;
  for (i = 0; i < 3; i++)
    CHECK(nbdserve_cas_gc(cas, &bytes, NULL, NULL) == 0);
  q_check(cas);
  nbdserve_cas_stat(cas, &stat);
  CHECK(bytes == stat.free);
  return stat;
}

/* Ranges of a difference: a byte per unit that is in one */
struct q_map {
  unsigned char is[1 << 16];
  uint64_t unit, end; /* bytes */
  int calls, stop;    /* at that call */
};

static int q_count(void *arg, uint64_t off, uint64_t len) {
  struct q_map *m = arg;
  CHECK(off % m->unit == 0 && len % m->unit == 0 && len > 0);
  return m->calls++, 0;
}

static uint32_t q_pick(uint32_t *x, uint32_t n) { /* 0..n-1 */
  return (h_next(x) >> 6) % n;
}

/* One change of whatever kind.  There are v, w and x, with snapshots 0 to 2. */
static void q_any(struct nbdserve_cas *cas, uint32_t *x) {
  static const char *const volumes[] = {"v", "w", "x"};
  const char *name = volumes[q_pick(x, 3)];
  uint64_t off = (uint64_t)q_pick(x, 300) * 4096 + q_pick(x, 2) * 100;
  uint64_t len = 1 + q_pick(x, 300000);
  struct nbdserve_export e = {0};
  char snapshot[9], id[72];
  int err = 0;
  snprintf(snapshot, sizeof snapshot, "%s@%u", name, (unsigned)q_pick(x, 3));
  switch (q_pick(x, 12)) {
  case 0:
    err = nbdserve_cas_snapshot(cas, snapshot);
    break;
  case 1:
    err = nbdserve_cas_rm(cas, snapshot);
    break;
  case 2:
    err = nbdserve_cas_rollback(cas, snapshot);
    break;
  case 3:
    err = nbdserve_cas_seal(cas, snapshot, id, NULL, NULL);
    break;
  case 4:
    err = nbdserve_cas_rm(cas, name);
    if (!err) err = nbdserve_cas_create(cas, name, UINT64_C(16) << 20);
    break;
  case 5:
    err = nbdserve_cas_resize(cas, name, (UINT64_C(16) << 20) + len);
    break;
  default:
    CHECK(nbdserve_cas_volume(cas, name, &e) == 0);
    if (q_pick(x, 3) == 0)
      err = e.ops->trim(e.ctx, off, len, 0);
    else if (q_pick(x, 3) == 0)
      err = e.ops->zero(e.ctx, off, len, 0);
    else
      q_put(cas, name, off, len, 1 + (int)q_pick(x, 200));
    if (q_pick(x, 4) == 0) CHECK(e.ops->flush(e.ctx, 0) == 0);
    e.ops->close(e.ctx);
  }
  CHECK(!err || err == -ENOENT || err == -EEXIST || err == -ENOTEMPTY);
  q_check(cas);
}

/* The slots that a running store counts as used and free are those that are
 * found when it is opened: none is lost, and none is given out twice.  In the
 * end all are free but those of the catalog. */
static void u_slots(void) {
  char path[500];
  struct nbdserve_cas *cas = q_new(path, "slots", 0);
  static const char *const left[] = {"v@0", "v@1", "v@2", "w@0", "w@1", "w@2",
                                     "x@0", "x@1", "x@2", "v",   "w",   "x"};
  struct nbdserve_cas_stat empty, running, opened;
  uint32_t x = t_seed(), i, k;
  for (i = 9; i < 12; i++)
    CHECK(nbdserve_cas_create(cas, left[i], UINT64_C(16) << 20) == 0);
  empty = q_idle(cas);
  for (k = 0; k < 12; k++) {
    for (i = 0; i < 30; i++)
      q_any(cas, &x);
    running = q_idle(cas);
    CHECK(nbdserve_cas_verify(cas, k_damage, NULL, NULL) == 0);
    CHECK(nbdserve_cas_close(cas) == 0);
    cas = q_open(path, 0);
    q_check(cas);
    nbdserve_cas_stat(cas, &opened);
    CHECK(opened.stored == running.stored && opened.free == running.free);
  }
  for (i = 0; i < 12; i++) {
    int err = nbdserve_cas_rm(cas, left[i]);
    CHECK(!err || (i < 9 && err == -ENOENT));
    q_check(cas);
  }
  running = q_idle(cas);
  CHECK(running.stored <= empty.stored);
  CHECK(nbdserve_cas_close(cas) == 0);
}

/* With room for 16 leaves, a map of 40 is written, shared, compared and read */
static void u_cache(void) {
  struct nbdserve_cas_options o = {.cache_mib = 1};
  char path[500];
  static const char *const names[] = {"v", "v@0", "v@1", "v@2"};
  struct nbdserve_cas *cas = q_new(path, "cache", 65536);
  const uint64_t gib = UINT64_C(1) << 30;
  uint32_t i, k;
  CHECK(nbdserve_cas_create(cas, "v", 40 * gib) == 0);
  CHECK(nbdserve_cas_close(cas) == 0);
  alarm(60); /* or it does not come back */
  CHECK(nbdserve_cas_open(path, &o, &cas) == 0);
  for (k = 0; k < 3; k++) {
    for (i = 0; i < 40; i++)
      q_put(cas, "v", i * gib + k * 65536, 65536, (int)(1 + k));
    CHECK(nbdserve_cas_snapshot(cas, names[k + 1]) == 0);
  }
  for (i = 0; i < 16; i++) {
    static struct q_map m;
    memset(&m, 0, sizeof m);
    m.unit = 65536;
    CHECK(nbdserve_cas_diff(cas, names[i % 4], names[i / 4], q_count, &m) == 0);
    k = i / 4 ? i / 4 - 1 : 2; /* v is as v@2 */
    k -= i % 4 ? i % 4 - 1 : 2;
    CHECK(m.calls == (k ? 40 : 0));
  }
  for (i = 0; i < 120; i++) {
    unsigned char b = 0;
    CHECK(q_get(cas, "v@1", i % 40 * gib + i / 40 * 65536, 1, &b) == 0);
    CHECK(b == (i / 40 < 2 ? 1 + i / 40 : 0));
  }
  CHECK(nbdserve_cas_verify(cas, k_damage, NULL, NULL) == 0);
  for (i = 4; i-- > 0;)
    CHECK(nbdserve_cas_rm(cas, names[i]) == 0);
  q_check(cas);
  CHECK(nbdserve_cas_close(cas) == 0);
  alarm(0);
}

/* Leaves that are dirty until a checkpoint, more than there is room for, are
 * copied when a snapshot shares them: the hand that evicts them spares it. */
static void u_hand(void) {
  struct nbdserve_cas_options o = {.cache_mib = 1};
  const uint64_t leaf = 1016 * 4096; /* what one leads to */
  char path[500], name[20];
  struct nbdserve_cas *cas = q_new(path, "hand", 4096);
  uint32_t i, k, x = 2; /* x: a linear congruential generator */
  CHECK(nbdserve_cas_create(cas, "v", 600 * leaf) == 0);
  CHECK(nbdserve_cas_close(cas) == 0);
  CHECK(nbdserve_cas_open(path, &o, &cas) == 0);
  for (k = 0; k < 12; k++) {
    for (i = 0; i < 500; i++) {
      x = x * 1664525 + 1013904223;
      q_put(cas, "v", (x >> 8) % 600 * leaf + (x >> 20) % 1000 * 4096, 4096,
            (int)(1 + (x >> 12) % 255));
    }
    snprintf(name, sizeof name, "v@%u", k);
    CHECK(nbdserve_cas_snapshot(cas, name) == 0);
  }
  CHECK(nbdserve_cas_close(cas) == 0);
  /* There are thousands, and room for 256. */
  CHECK(nbdserve_cas_open(path, &o, &cas) == 0);
  os_lock(&cas->lock);
  CHECK(cas->nleaves <= 256);
  cas_unlock(cas);
  CHECK(nbdserve_cas_close(cas) == 0);
}

/* What is damaged gets no id: not even what is known by its digest only */
static void u_rotten(void) {
  char path[500], id[72], c;
  struct nbdserve_cas *cas;
  unsigned char b[4096];
  off_t at;
  int fd, i;
  for (i = 0; i < 4; i++) { /* data or digest is rotten; checked reads or not */
    char name[20];
    snprintf(name, sizeof name, "rotten%d", i);
    cas = q_new(path, name, 0);
    CHECK(nbdserve_cas_create(cas, "v", 4096 * 300) == 0);
    q_put(cas, "v", 280 * 4096, 4096, 'q');
    CHECK(nbdserve_cas_snapshot(cas, "v@s") == 0);
    CHECK(nbdserve_cas_close(cas) == 0);
    fd = open(path, O_RDWR);
    for (at = 0; pread(fd, b, 4096, at) == 4096; at += 4096)
      if (b[0] == 'q' && !memcmp(b, b + 1, 4095)) break;
    CHECK(pread(fd, b, 4096, at) == 4096 && b[0] == 'q');
    if (i % 2) { /* a group's digests lie in front of it: see nbdserve.h */
      off_t group = (2 << 20) + 64 * 4096;
      group = (group + (1 << 20) - 1) / (1 << 20) * (1 << 20);
      at = group + (at - group - (1 << 20)) / 4096 * 32;
    }
    CHECK(pread(fd, &c, 1, at) == 1);
    c ^= 4;
    CHECK(pwrite(fd, &c, 1, at) == 1);
    close(fd);
    cas = q_open(path, i < 2 ? NBDSERVE_CAS_NO_VERIFY : NBDSERVE_CAS_VERIFY);
    memset(id, 'x', sizeof id);
    CHECK(nbdserve_cas_seal(cas, "v@s", id, NULL, NULL) == -EIO && !*id);
    CHECK(!strcmp(q_ids(cas), "v= v@s= "));
    q_put(cas, "v", 280 * 4096, 4096, 'q'); /* which heals nothing of it */
    CHECK(nbdserve_cas_seal(cas, "v@s", id, NULL, NULL) == -EIO);
    CHECK(nbdserve_cas_snapshot(cas, "v@t") == 0);
    CHECK(nbdserve_cas_seal(cas, "v@t", id, NULL, NULL) == 0);
    CHECK(nbdserve_cas_close(cas) == 0);
  }
}

static int q_range(void *arg, uint64_t off, uint64_t len) {
  struct q_map *m = arg;
  CHECK(len > 0 && off % m->unit == 0 && (!m->calls || off > m->end));
  m->end = off + len;
  for (; len > 0; off += len < m->unit ? len : m->unit,
                  len -= len < m->unit ? len : m->unit)
    m->is[off / m->unit] = 1;
  return ++m->calls == m->stop ? 77 : 0;
}

/* Waits until what is stored is found again: so that nothing is stored twice */
static void q_settle(struct nbdserve_cas *cas) {
  struct nbdserve_export e = {0};
  CHECK(nbdserve_cas_begin(cas, "settle", 1, &e) == 0);
  CHECK(nbdserve_cas_finish(cas, &e, 0) == 0);
}

static int q_twice; /* the same may be stored twice */

/* In the context of a, the extents of b are what diff has found */
static void q_same_extents(struct nbdserve_cas *cas, const char *a,
                           const char *b, const struct q_map *m) {
  static unsigned char room[16000];
  struct nbdserve_extents x = {.align = 1, .max = 1000, .each = 16};
  struct nbdserve_export e = {0};
  uint64_t at = 0, n;
  unsigned i;
  CHECK(nbdserve_cas_volume(cas, b, &e) == 0);
  x.context = cas_find(cas, a, strlen(a), VIEW_NOW)->id;
  x.left = e.size;
  x.data = room;
  if (!strchr(a, '@') || strncmp(a, b, strcspn(a, "@")) != 0) {
    CHECK(e.ops->extents(e.ctx, 0, 1, 0, &x) == -EINVAL);
    e.ops->close(e.ctx);
    return; /* it is no context of b */
  }
  if (e.size) CHECK(e.ops->extents(e.ctx, 0, e.size, 0, &x) == 0);
  for (i = 0; i < x.n; i++)
    for (n = t_get(x.data + 16 * i, 8); n > 0;) {
      uint64_t piece = 4096 - at % 4096;
      if (piece > n) piece = n;
      CHECK((int)t_get(x.data + 16 * i + 8, 8) == m->is[at / 4096]);
      at += piece;
      n -= piece;
    }
  CHECK(at == e.size);
  e.ops->close(e.ctx);
}

static void q_same(struct nbdserve_cas *cas, const char *a, const char *b,
                   uint64_t a_size, uint64_t b_size) {
  static unsigned char p[2][1 << 19];
  uint64_t size = a_size > b_size ? a_size : b_size, at, n;
  struct q_map m;
  memset(p, 0, sizeof p);
  memset(&m, 0, sizeof m);
  m.unit = 4096;
  if (a_size) CHECK(q_get(cas, a, 0, a_size, p[0]) == 0);
  if (b_size) CHECK(q_get(cas, b, 0, b_size, p[1]) == 0);
  CHECK(nbdserve_cas_diff(cas, a, b, q_range, &m) == 0);
  CHECK(m.end <= size);
  q_same_extents(cas, a, b, &m);
  for (at = 0; at < size; at += n) {
    n = size - at < 4096 ? size - at : 4096;
    if (a_size != b_size &&
        (at == a_size - a_size % 4096 || at == b_size - b_size % 4096) &&
        m.is[at / 4096])
      continue; /* the end of one inside a block is taken for a difference */
    if (!q_twice || !m.is[at / 4096])
      CHECK((memcmp(p[0] + at, p[1] + at, (size_t)n) != 0) == m.is[at / 4096]);
  }
  if (size && m.is[(size - 1) / 4096]) CHECK(m.end == size);
}

static void u_diff(void) {
  char path[500];
  static const char *const names[] = {"v", "v@1", "v@2", "w", "w@1", "e"};
  uint64_t size[6];
  struct nbdserve_cas *cas = q_new(path, "diff", 0);
  struct q_map m;
  uint32_t x = 5, i, k;
  int64_t start = os_now_ms();

  /* two snapshots of a terabyte: what they share costs nothing */
  CHECK(nbdserve_cas_create(cas, "v", UINT64_C(1) << 40) == 0);
  for (i = 0; i < 64; i++)
    q_put(cas, "v", (uint64_t)i << 34, 65536, 'a');
  CHECK(nbdserve_cas_snapshot(cas, "v@1") == 0);
  q_put(cas, "v", (UINT64_C(7) << 34) + 5000, 1, 'b');
  CHECK(nbdserve_cas_snapshot(cas, "v@2") == 0);
  memset(&m, 0, sizeof m);
  m.unit = UINT64_C(1) << 34;
  m.end = 0;
  for (i = 0; i < 100; i++) {
    struct q_map one = m;
    one.unit = 4096 + (UINT64_C(7) << 34);
    CHECK(nbdserve_cas_diff(cas, "v@1", "v@2", q_range, &one) == 0);
    CHECK(one.calls == 1 && one.end == 8192 + (UINT64_C(7) << 34));
  }
  CHECK(os_now_ms() - start < 5000);
  CHECK(nbdserve_cas_diff(cas, "v@1", "no", q_range, &m) == -ENOENT);
  CHECK(nbdserve_cas_diff(cas, "no", "v@1", q_range, &m) == -ENOENT);
  CHECK(nbdserve_cas_diff(cas, "v@1", "v@1", q_range, &m) == 0 && !m.calls);
  CHECK(nbdserve_cas_rm(cas, "v@1") == 0);
  CHECK(nbdserve_cas_rm(cas, "v@2") == 0);
  CHECK(nbdserve_cas_rm(cas, "v") == 0); /* nothing is left open */

  for (k = 0; k < 12; k++) {
    q_twice = k > 6;
    q_settle(cas);
    size[0] = size[1] = size[2] = k < 2 ? 409600 : 1 + h_next(&x) % 400000;
    size[3] = size[4] = k < 1 ? 409600 : 1 + h_next(&x) % 400000;
    size[5] = 0;
    CHECK(nbdserve_cas_create(cas, "v", size[0]) == 0);
    CHECK(nbdserve_cas_create(cas, "w", size[3]) == 0);
    CHECK(nbdserve_cas_create(cas, "e", 0) == 0);
    for (i = 0; i < 120; i++) {
      uint32_t to = h_next(&x) % 2 ? 0 : 3;
      uint32_t off = h_next(&x) % (uint32_t)size[to], n, y;
      if (h_next(&x) % 3) off -= off % 4096;
      n = 1 + h_next(&x) % (h_next(&x) % 4 ? 4096 : 40000);
      if (h_next(&x) % 2) n = (n + 4095) / 4096 * 4096;
      if (n > size[to] - off) n = (uint32_t)size[to] - off;
      q_put(cas, names[to], off, n, "abc\0"[h_next(&x) % 4]);
      for (y = 1; q_twice && h_next(&x) % 4 == 0 && y < cas->nslots; y++)
        if (CAS_AT(cas, y, refs) > 0 && CAS_AT(cas, y, tag) & TAG_INDEXED)
          cas_unindex(cas, y); /* so that the same is stored twice */
      if (i == 40) CHECK(nbdserve_cas_snapshot(cas, "v@1") == 0);
      if (i == 50) CHECK(nbdserve_cas_snapshot(cas, "w@1") == 0);
      if (i == 80) CHECK(nbdserve_cas_snapshot(cas, "v@2") == 0);
      if (i == 90 && k > 3) {
        size[0] = 1 + h_next(&x) % 400000;
        CHECK(nbdserve_cas_resize(cas, "v", size[0]) == 0);
      }
    }
    for (i = 0; i < 36; i++)
      q_same(cas, names[i / 6], names[i % 6], size[i / 6], size[i % 6]);
    CHECK(nbdserve_cas_close(cas) == 0);
    cas = q_open(path, k % 2 ? NBDSERVE_CAS_READONLY : 0);
    for (i = 0; i < 36; i++)
      q_same(cas, names[i / 6], names[i % 6], size[i / 6], size[i % 6]);
    memset(&m, 0, sizeof m);
    m.unit = 4096;
    m.stop = 2;
    i = (uint32_t)nbdserve_cas_diff(cas, "v", "w", q_range, &m);
    CHECK(i == (m.calls == 2 ? 77 : 0));
    if (k == 0) CHECK(m.calls == 2);
    CHECK(nbdserve_cas_close(cas) == 0);
    cas = q_open(path, 0);
    for (i = 6; i-- > 0;)
      CHECK(nbdserve_cas_rm(cas, names[i]) == 0);
  }
  CHECK(nbdserve_cas_close(cas) == 0);
}

/* ---- What is true only while a flush runs ---- */

/* A host's disk that loses what was not flushed: a flush makes last what had
 * been written when it began, and says so 60 ms later. */
struct slow_disk {
  pthread_mutex_t lock;
  int written;  /* so many writes were done */
  int durable;  /* and so many of these last */
  int at[64];   /* number of the last write to each block of 512 bytes */
  int begun;    /* flushes */
  int finished; /* of these */
};

static int w_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                  uint32_t flags) {
  (void)ctx;
  (void)off;
  (void)flags;
  memset(buf, 0, (size_t)len);
  return 0;
}

static int w_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                   uint32_t flags) {
  struct slow_disk *d = ctx;
  (void)buf;
  CHECK(len == 512 && flags == 0);
  pthread_mutex_lock(&d->lock);
  d->at[off / 512] = ++d->written;
  pthread_mutex_unlock(&d->lock);
  return 0;
}

static int w_flush(void *ctx, uint32_t flags) {
  struct slow_disk *d = ctx;
  int written;
  CHECK(flags == 0);
  pthread_mutex_lock(&d->lock);
  written = d->written;
  d->begun++;
  pthread_mutex_unlock(&d->lock);
  t_sleep(60);
  pthread_mutex_lock(&d->lock);
  if (d->durable < written) d->durable = written;
  d->finished++;
  pthread_mutex_unlock(&d->lock);
  return 0;
}

/* A member of the disk, under its lock */
static int w_get(struct slow_disk *d, const int *member) {
  int value;
  pthread_mutex_lock(&d->lock);
  value = *member;
  pthread_mutex_unlock(&d->lock);
  return value;
}

struct writer { /* one client, which writes to a block of its own */
  struct slow_disk *disk;
  struct served v;
  struct t_conn c;
  pthread_t thread;
  int block;
};

/* Its last write must last, because the server has said so */
static void w_lasts(struct writer *w) {
  int at = w_get(w->disk, &w->disk->at[w->block]);
  CHECK(w_get(w->disk, &w->disk->durable) >= at);
}

static void *w_run(void *arg) {
  struct writer *w = arg;
  uint64_t off = 512u * (unsigned)w->block;
  char b[512] = "";
  int i;
  for (i = 0; i < 8; i++) {
    t_sleep(i * w->block % 5 * 11);
    if (i % 3 == 2) {
      CHECK(t_do(&w->c, FUA, WRITE, off, 512, b) == 0);
    } else {
      CHECK(t_do(&w->c, 0, WRITE, off, 512, b) == 0);
      CHECK(t_do(&w->c, 0, FLUSH, 0, 0, NULL) == 0);
    }
    w_lasts(w);
  }
  return NULL;
}

/* A flush that is asked for while one is running, on the same connection: the
 * write in between is not covered by the first.  The very first flush comes
 * alone, and is done before the write is looked at. */
static void w_in_line(struct writer *w) {
  static struct t_reply r;
  uint64_t off = 512u * (unsigned)w->block;
  char b[512] = "";
  int round, begun, k;
  for (round = 0; round < 3; round++) {
    begun = w_get(w->disk, &w->disk->begun);
    CHECK(t_send(&w->c, 0, FLUSH, 1, 0, 0, NULL) == 0);
    while (w_get(w->disk, &w->disk->begun) == begun)
      t_sleep(1);
    CHECK(t_send(&w->c, 0, WRITE, 2, off, 512, b) == 0);
    CHECK(t_recv(&w->c, &r) && !r.error);
    CHECK((uint32_t)r.cookie == (round ? 2 : 1));
    if (!round) CHECK(t_recv(&w->c, &r) && !r.error);
    CHECK(t_send(&w->c, 0, FLUSH, 3, 0, 0, NULL) == 0);
    for (k = !round; k < 2; k++) {
      CHECK(t_recv(&w->c, &r) && !r.error);
      CHECK(w_get(w->disk, &w->disk->finished) > begun);
      if ((uint32_t)r.cookie == 3) w_lasts(w);
    }
  }
}

/* Every reply to a FLUSH or FUA says that what was written lasts, also when
 * another client's flush was running when it was asked for */
static void u_joined(void) {
  static const struct nbdserve_ops ops = {
      .read = w_read, .write = w_write, .flush = w_flush};
  static struct slow_disk disk;
  static struct writer w[6];
  struct nbdserve_export e = {0};
  struct nbdserve *s;
  char b[512] = "";
  int i;
  pthread_mutex_init(&disk.lock, NULL);
  e.size = 65536;
  e.ops = &ops;
  e.ctx = &disk;
  e.flags = NBDSERVE_EXPORT_MULTI_CONN;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  for (i = 0; i < COUNT(w); i++) {
    w[i].disk = &disk;
    w[i].block = i;
    s_start(&w[i].v, s, &w[i].c);
    CHECK(t_open(&w[i].c, w[i].c.fd, "", i % 3) == 0);
  }
  w_in_line(&w[0]);
  w_in_line(&w[1]);
  for (i = 1; i < COUNT(w); i++) /* they all wait for one that is running */
    CHECK(t_do(&w[i].c, 0, WRITE, 512u * (unsigned)i, 512, b) == 0);
  disk.begun = 0;
  CHECK(t_send(&w[0].c, 0, FLUSH, 7, 0, 0, NULL) == 0);
  while (w_get(&disk, &disk.begun) == 0)
    t_sleep(1);
  for (i = 1; i < COUNT(w); i++)
    CHECK(t_send(&w[i].c, 0, FLUSH, 7, 0, 0, NULL) == 0);
  for (i = 0; i < COUNT(w); i++) {
    struct t_reply r = {0};
    CHECK(t_recv(&w[i].c, &r) && !r.error);
    w_lasts(&w[i]);
  }
  CHECK(disk.begun <= 3); /* and then for one that they have in common */
  for (i = 0; i < COUNT(w); i++)
    CHECK(!pthread_create(&w[i].thread, NULL, w_run, &w[i]));
  for (i = 0; i < COUNT(w); i++) {
    pthread_join(w[i].thread, NULL);
    t_close(&w[i].c);
    CHECK(s_end(&w[i].v) == 0);
  }
  nbdserve_free(s);
}

/* A host with so many exports that the answer to LIST fills every buffer on the
 * way: who does not read it must not keep others from coming in, being served
 * and adding exports. */
static void u_listed(void) {
  static char description[4097];
  struct ram *r = r_new(65536);
  struct nbdserve_export e;
  struct served v[2];
  struct t_conn deaf, good;
  struct nbdserve_stats stats;
  struct nbdserve *s;
  char name[20], b[512];
  int i;
  memset(v, 0, sizeof v);
  memset(description, 'd', 4096);
  CHECK(nbdserve_new(&s, NULL) == 0);
  for (i = 0; i < 1300; i++) {
    snprintf(name, sizeof name, "e%d", i);
    e = r_export(i ? r_new(512) : r, 0);
    e.name = name;
    e.description = description;
    CHECK(nbdserve_add(s, &e) == 0);
  }
  s_start(&v[0], s, &deaf);
  CHECK(t_read(deaf.fd, b, 18) == 18 && t_write(deaf.fd, "\0\0\0\3", 4) == 0);
  CHECK(t_option(deaf.fd, 3, "", 0) == 0);
  t_sleep(100); /* the answer is stuck */
  alarm(4);
  s_start(&v[1], s, &good);
  CHECK(t_open(&good, good.fd, "e0", 1) == 0);
  CHECK(t_do(&good, 0, READ, 0, 512, b) == 0);
  e.name = "one more";
  e.ctx = r_new(512);
  CHECK(nbdserve_add(s, &e) == 0);
  nbdserve_stats(s, &stats);
  CHECK(stats.clients_now == 2);
  t_close(&good);
  CHECK(s_end(&v[1]) == 0);
  close(deaf.fd);
  (void)s_end(&v[0]);
  nbdserve_free(s);
}

/* Stopping waits for clients that take their replies, but not for ever: one on
 * a socket that nbdserve_run accepted, and that reads nothing, is left alone
 * after the grace of 5 s, as is one of nbdserve_serve that reads a little now
 * and then, which does not start the grace anew */
static void u_deaf(void) {
  struct ram *r = r_new(4 << 20);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s, *other;
  struct sipper p;
  struct t_conn c;
  pthread_t run;
  void *result;
  int64_t from;
  int i, fd;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  e = r_export(r_new(4 << 20), 0);
  CHECK(nbdserve_new(&other, NULL) == 0 && nbdserve_add(other, &e) == 0);
  fd = u_dial(s);
  CHECK(pthread_create(&run, NULL, u_run, s) == 0);
  CHECK(t_open(&c, fd, "", 1) == 0);
  for (i = 0; i < 20; i++)
    CHECK(t_send(&c, 0, READ, (uint32_t)i, 0, 4 << 20, NULL) == 0);
  sip_start(&p, other, 20, 4 << 20);
  t_sleep(100);
  from = t_now();
  nbdserve_stop(s);
  nbdserve_stop(other);
  i = sip(&p, 100, 9000);
  CHECK(i > 3000 && i < 9000);
  CHECK(pthread_join(run, &result) == 0 && result == NULL);
  CHECK(t_now() - from > 3000 && t_now() - from < 9000);
  CHECK(r->calls[FLUSH] > 0);
  (void)sip_end(&p);
  nbdserve_free(s);
  nbdserve_free(other);
  close(fd);
}

/* Clients that vanish in the midst of a WRITE to a host's backend leave nothing
 * behind (main looks at what is still allocated) */
static void u_cut(void) {
  static char b[1 << 20];
  struct ram *r = r_new(sizeof b);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  long before;
  int i;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  before = m_left();
  for (i = 0; i < 60; i++) {
    struct served v = {0};
    struct t_conn c;
    uint32_t len = i % 2 ? sizeof b : 131072 + 4096 * (unsigned)i;
    unsigned char h[32];
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", i % 3) == 0);
    t_head(h, 0, WRITE, 1, 0, len);
    if (i % 3 == 2) {
      memcpy(h, "\x21\xe4\x1c\x71\0\40", 6);
      t_put(h + 24, 8, len);
    }
    CHECK(t_write(c.fd, h, i % 3 == 2 ? 32 : 28) == 0);
    CHECK(t_write(c.fd, b, len / 60 * (unsigned)i) == 0);
    close(c.fd);
    CHECK(s_end(&v) != 0);
    CHECK(m_left() == before);
  }
  CHECK(r->calls[WRITE] == 0);
  nbdserve_free(s);
}

/* ---- A host whose functions return what they must not ---- */

/* What the host does wrong in its next call */
enum lie {
  HONEST,
  POSITIVE,   /* an operation returns a positive errno */
  STATUS_BITS /* extents reports a status that does not exist */
};
static int lie; /* (t_hold) */

static int lie_answer(int error) {
  return t_hold(&lie, -1) == POSITIVE ? EIO : error;
}

static int lie_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                    uint32_t flags) {
  return lie_answer(r_read(ctx, buf, off, len, flags));
}

static int lie_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                     uint32_t flags) {
  return lie_answer(r_write(ctx, buf, off, len, flags));
}

static int lie_flush(void *ctx, uint32_t flags) {
  return lie_answer(r_flush(ctx, flags));
}

static int lie_trim(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  return lie_answer(r_trim(ctx, off, len, flags));
}

static int lie_zero(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  return lie_answer(r_zero(ctx, off, len, flags));
}

static int lie_cache(void *ctx, uint64_t off, uint64_t len, uint32_t flags) {
  return lie_answer(r_leave(ctx, r_enter(ctx, CACHE, off, len, flags)));
}

static int lie_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                       struct nbdserve_extents *out) {
  if (t_hold(&lie, -1) == STATUS_BITS)
    return nbdserve_extent(out, len, 0x80000004u) < 0;
  return lie_answer(r_extents(ctx, off, len, flags, out));
}

static const struct nbdserve_ops lie_ops = {.read = lie_read,
                                            .write = lie_write,
                                            .flush = lie_flush,
                                            .trim = lie_trim,
                                            .zero = lie_zero,
                                            .cache = lie_cache,
                                            .extents = lie_extents,
                                            .close = r_close};

static int lie_logged; /* errors and warnings (t_hold) */

static void lie_log(void *ctx, int level, const char *message) {
  (void)ctx;
  CHECK(strlen(message) > 10);
  if (level <= NBDSERVE_LOG_WARNING) t_hold(&lie_logged, 1);
}

/* Was something logged since the last look? */
static int lie_was_logged(void) {
  int was = t_hold(&lie_logged, -1);
  t_hold(&lie_logged, 0);
  return was;
}

static void lie_server(struct nbdserve **s, struct nbdserve_config *config) {
  config->version = NBDSERVE_VERSION_NUMBER;
  config->log = lie_log;
  config->log_level = NBDSERVE_LOG_WARNING;
  CHECK(nbdserve_new(s, config) == 0);
}

/* Requests on a backend that lies are EIO, in every way that they take through
 * the server; what follows is answered as if nothing had been */
static void u_lies(void) {
  static const int what[] = {READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS};
  static char b[3 << 20];
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  int mode, serial, i, k;
  for (serial = 0; serial < 2; serial++) {
    struct ram *r = r_new(sizeof b);
    struct nbdserve_export e = r_export(r, serial ? NBDSERVE_EXPORT_SERIAL : 0);
    struct served v[2];
    struct t_conn other;
    memset(v, 0, sizeof v);
    e.ops = &lie_ops;
    lie_server(&s, &config);
    CHECK(nbdserve_add(s, &e) == 0);
    s_start(&v[1], s, &other);
    CHECK(t_open(&other, other.fd, "", 1) == 0);
    for (mode = 0; mode < 3; mode++) {
      struct t_conn c;
      s_start(&v[0], s, &c);
      CHECK(t_open(&c, c.fd, "", mode) == 0);
      for (i = 0; i < COUNT(what); i++)
        for (k = 0; k < 3; k++) { /* short, for a worker, in pieces */
          uint32_t len = what[i] == FLUSH ? 0
                         : k == 0         ? 512
                         : k == 1         ? 1 << 20
                                          : sizeof b;
          if (what[i] == STATUS && mode == 0) continue;
          t_hold(&lie, POSITIVE);
          CHECK(t_do(&c, 0, what[i], 0, len, b) == 5);
          t_hold(&lie, HONEST);
          CHECK(t_do(&c, 0, what[i], 0, len, b) == 0);
        }
      t_hold(&lie, POSITIVE);
      CHECK(t_do(&c, FUA, WRITE, 0, 512, b) == 5);
      CHECK(lie_was_logged() || mode > 0); /* at least the first ones */
      t_hold(&lie, STATUS_BITS);
      if (mode) i = t_do(&c, 0, STATUS, 0, 65536, NULL);
      CHECK(!mode || i == 5 || i == 22);
      t_hold(&lie, HONEST);
      CHECK(t_do(&other, 0, READ, 0, 512, b) == 0);
      t_close(&c);
      CHECK(s_end(&v[0]) == 0);
    }
    t_close(&other);
    CHECK(s_end(&v[1]) == 0);
    nbdserve_free(s);
    CHECK(r->closes == 1);
  }
}

/* Callbacks of the configuration, and ops->size, that lie */
static uint64_t lie_size(void *ctx, uint64_t size) {
  (void)ctx;
  (void)size;
  return (uint64_t)INT64_MAX + 1;
}

static int lie_find(void *ctx, const char *name, struct nbdserve_export *out) {
  static const struct nbdserve_ops none = {.write = r_write, .close = r_close};
  if (!strcmp(name, "two")) return 2;
  if (!strcmp(name, "huge")) return INT_MIN;
  if (strcmp(name, "empty") != 0) return -ENOENT;
  *out = r_export(ctx, 0);
  out->ops = &none;
  return 0;
}

static int lie_before(void *ctx, unsigned type, uint64_t off, uint64_t len) {
  (void)ctx;
  (void)type;
  (void)len;
  return off == 4096 ? 5 : 0;
}

static int lie_list(void *ctx, nbdserve_emit_fn *emit, void *arg) {
  (void)ctx;
  (void)emit(arg, "listed", NULL);
  return 2;
}

/* Sends GO for a name, and asks for block sizes if `asks` is 1: the type of the
 * answer, behind the information */
static uint32_t lie_go_asking(struct t_conn *c, const char *name,
                              uint32_t asks) {
  unsigned char p[100], b[4200];
  uint32_t n = (uint32_t)strlen(name), type;
  t_put(p, 4, n);
  memcpy(p + 4, name, n);
  t_put(p + 4 + n, 2, asks);
  t_put(p + 6 + n, 2, 3);
  CHECK(t_option(c->fd, 7, p, n + 6 + 2 * asks) == 0);
  while ((type = t_answer(c->fd, b)) == 3)
    ;
  return type;
}

static uint32_t lie_go(struct t_conn *c, const char *name) {
  return lie_go_asking(c, name, 0);
}

/* The answers to LIST: how many exports, and the type of the last answer */
static int lie_list_answers(struct t_conn *c, uint32_t *last) {
  unsigned char b[4200];
  int n = 0;
  CHECK(t_option(c->fd, 3, "", 0) == 0);
  while ((*last = t_answer(c->fd, b)) == 2)
    n++;
  return n;
}

static void u_liestold(void) {
  static const char *const wrong[] = {"two", "huge", "empty", "sized"};
  struct nbdserve_config config = {0};
  struct ram *r = r_new(65536), *found = r_new(65536);
  struct nbdserve_export e = r_export(r, 0), sized = r_export(r_new(512), 0);
  struct nbdserve_ops size_ops = r_ops;
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  unsigned char b[512];
  uint32_t type;
  int i, n;
  config.find = lie_find;
  config.before = lie_before;
  config.list = lie_list;
  config.ctx = found;
  size_ops.size = lie_size;
  sized.name = "sized";
  sized.ops = &size_ops;
  lie_server(&s, &config);
  CHECK(nbdserve_add(s, &e) == 0 && nbdserve_add(s, &sized) == 0);
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, b, 18) == 18 && t_write(c.fd, "\0\0\0\3", 4) == 0);
  for (i = 0; i < COUNT(wrong); i++) {
    CHECK(lie_go(&c, wrong[i]) >> 31 == 1);
    CHECK(lie_was_logged());
  }
  CHECK(found->closes == 1); /* "empty" was refused, and closed */
  n = lie_list_answers(&c, &type);
  CHECK(n == 3 && (type >> 31 == 1 || type == 1) && lie_was_logged());
  CHECK(lie_go(&c, "ram") == 1); /* haggling has gone on in step */
  c.structured = 0;
  CHECK(t_do(&c, 0, READ, 4096, 512, b) == 5);
  CHECK(t_do(&c, 0, WRITE, 4096, 512, b) == 5 && lie_was_logged());
  CHECK(r->calls[READ] == 0 && r->calls[WRITE] == 0);
  CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

static int lie_list_fails(void *ctx, nbdserve_emit_fn *emit, void *arg) {
  (void)ctx;
  return emit(arg, "listed", NULL) ? 0 : -EIO;
}

/* An error of the host's list is told to the client, which is not dropped */
static void u_listfails(void) {
  struct nbdserve_config config = {0};
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, 0);
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  unsigned char b[512];
  uint32_t type;
  config.list = lie_list_fails;
  lie_server(&s, &config);
  CHECK(nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, b, 18) == 18 && t_write(c.fd, "\0\0\0\3", 4) == 0);
  CHECK(lie_list_answers(&c, &type) == 2 && type >> 31 == 1);
  CHECK(lie_list_answers(&c, &type) == 2 && type >> 31 == 1);
  CHECK(lie_go(&c, "ram") == 1);
  c.structured = 0;
  CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

/* Bytes of clients that have gone must not hide a call of nbdserve_wake */
static void u_poked(void) {
  struct nbdserve *s;
  int i, fd[2];
  CHECK(nbdserve_new(&s, NULL) == 0);
  for (i = 0; i < 400; i++) {
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    close(fd[1]);
    (void)nbdserve_serve(s, fd[0], fd[0], NULL);
    close(fd[0]);
  }
  alarm(5);
  nbdserve_wake(s);
  CHECK(nbdserve_run(s) == -EINTR);
  for (i = 0; i < 2000; i++) /* and as often as one likes */
    nbdserve_wake(s);
  CHECK(nbdserve_run(s) == -EINTR);
  nbdserve_stop(s);
  CHECK(nbdserve_run(s) == 0);
  nbdserve_free(s);
}

/* ---- Signals in the library's threads ---- */

static char *g_page; /* may not be touched until the handler has run */
static int g_page_size;
static volatile sig_atomic_t g_faults;

static void g_handler(int sig) {
  (void)sig;
  g_faults++;
  if (mprotect(g_page, (size_t)g_page_size, PROT_READ | PROT_WRITE)) _exit(9);
}

/* A host that maps its data, and makes pages accessible when they are touched:
 * what a fault raises must reach its handler, what comes from elsewhere must
 * not arrive in our threads */
static int g_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                  uint32_t flags) {
  static const int synchronous[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  static const int others[] = {SIGTERM, SIGINT,  SIGHUP,  SIGUSR1, SIGUSR2,
                               SIGALRM, SIGCHLD, SIGPIPE, SIGXFSZ};
  sigset_t blocked;
  int i;
  (void)ctx;
  (void)off;
  (void)flags;
  CHECK(pthread_sigmask(SIG_BLOCK, NULL, &blocked) == 0);
  for (i = 0; i < COUNT(synchronous); i++)
    CHECK(!sigismember(&blocked, synchronous[i]));
  for (i = 0; i < COUNT(others); i++)
    CHECK(sigismember(&blocked, others[i]));
  CHECK(len <= (uint64_t)g_page_size);
  memcpy(buf, g_page, (size_t)len);
  return 0;
}

static void u_signals(void) {
  static const struct nbdserve_ops ops = {.read = g_read};
  struct nbdserve_config config = {0};
  struct sigaction action;
  struct nbdserve_export e = {0};
  struct nbdserve *s;
  struct t_conn c;
  pthread_t run;
  char b[512];
  int workers;
  memset(&action, 0, sizeof action);
  action.sa_handler = g_handler;
  CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
  CHECK(sigaction(SIGBUS, &action, NULL) == 0);
  g_page_size = (int)sysconf(_SC_PAGESIZE);
  g_page = mmap(NULL, (size_t)g_page_size, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(g_page != MAP_FAILED);
  memset(g_page, 'g', (size_t)g_page_size);
  config.version = NBDSERVE_VERSION_NUMBER;
  e.size = 512;
  e.ops = &ops;
  for (workers = 0; workers < 2; workers++) { /* its thread, or a worker */
    config.threads = workers ? 4 : 1;
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    c.fd = u_dial(s);
    CHECK(pthread_create(&run, NULL, u_run, s) == 0);
    CHECK(t_open(&c, c.fd, "", 0) == 0);
    CHECK(mprotect(g_page, (size_t)g_page_size, PROT_NONE) == 0);
    CHECK(t_do(&c, 0, READ, 0, 512, b) == 0 && b[0] == 'g' && b[511] == 'g');
    CHECK(g_faults == workers + 1);
    t_close(&c);
    nbdserve_stop(s);
    CHECK(pthread_join(run, NULL) == 0);
    nbdserve_free(s);
  }
}

/* ---- Every request gets its one answer ---- */

enum {
  X_SIZE = 65536,
  X_HOLE = 32768, /* from there on all is zero */
  X_REQUESTS = 100
};

/* Kinds of requests, with the error that each must get */
static const struct x_kind {
  int command, flags;
  uint64_t off;
  uint32_t len;
  int error;
} x_kinds[] = {
    {READ, 0, 0, 4096, 0},
    {READ, 0, X_HOLE, 8192, 0},
    {READ, 0, X_HOLE - 512, 1024, 0},
    {READ, 0, X_SIZE - 1, 2, 22},
    {READ, 0, 5, 0, 0},
    {WRITE, 0, 8192, 512, 0},
    {WRITE, FUA, 8704, 512, 0},
    {WRITE, 0, X_SIZE - 1, 2, 28},
    {WRITE, DF, 8192, 512, 22},
    {FLUSH, 0, 0, 0, 0},
    {FLUSH, DF, 0, 0, 22},
    {TRIM, 0, X_HOLE, 512, 0},
    {TRIM, 0, X_SIZE, 1, 22},
    {ZEROES, 0, X_HOLE + 4096, 4096, 0},
    {ZEROES, FUA, X_HOLE, 1, 0},
    {77, 0, 0, 0, 22},
};

/* One reply or chunk: READs must bring what the disk has */
static void x_check(const struct t_reply *r, const struct x_kind *k) {
  uint64_t i, from;
  CHECK((int)r->error == k->error);
  if (k->command != READ || k->error || !k->len) return;
  if (r->chunk == 0) return; /* the last one of several, without data */
  from = r->chunk < 0 ? k->off : r->off;
  CHECK(from >= k->off && from + r->len <= k->off + k->len);
  for (i = 0; i < r->len; i++)
    CHECK(r->data[i] == (from + i < X_HOLE ? 'r' : 0));
}

/* X_REQUESTS of random kinds are sent at once; each cookie must come back, with
 * the last chunk of its answer once, and nothing else */
static void x_round(struct t_conn *c, unsigned *seed) {
  static unsigned char all[X_REQUESTS * (32 + 512)];
  static char data[512];
  static struct t_reply r;
  unsigned char *p = all, done[X_REQUESTS];
  const struct x_kind *kinds[X_REQUESTS];
  int i, left = X_REQUESTS, extended = c->structured > 1;
  memset(data, 'r', sizeof data);
  memset(done, 0, sizeof done);
  for (i = 0; i < X_REQUESTS; i++) {
    const struct x_kind *k;
    *seed = *seed * 1103515245u + 12345;
    k = kinds[i] = &x_kinds[(*seed >> 16) % (unsigned)COUNT(x_kinds)];
    t_head(p, k->flags, k->command, (uint32_t)i, k->off, k->len);
    if (extended) {
      t_put(p, 4, 0x21e41c71);
      if (k->command == WRITE) p[5] |= PAYLOAD;
      t_put(p + 24, 8, k->len);
    }
    p += extended ? 32 : 28;
    if (k->command != WRITE) continue;
    memcpy(p, data, k->len);
    p += k->len;
  }
  CHECK(t_write(c->fd, all, (size_t)(p - all)) == 0);
  while (left > 0) {
    CHECK(t_recv(c, &r) && (uint32_t)r.cookie < X_REQUESTS);
    i = (int)(uint32_t)r.cookie;
    CHECK(!done[i]);
    x_check(&r, kinds[i]);
    done[i] = r.done != 0;
    left -= done[i];
  }
}

/* 120 rounds (SEED), over all forms of replies, own and host's backends, with
 * and without workers: a reply that is lost or double once in a thousand times
 * is found in every run */
static void u_mixed(void) {
  struct nbdserve_config config = {0};
  unsigned seed = t_seed();
  int how, round;
  config.version = NBDSERVE_VERSION_NUMBER;
  for (how = 0; how < 12; how++) {
    struct ram *r = r_new(X_SIZE);
    struct nbdserve_export e = r_export(r, 0);
    struct served v = {0};
    struct nbdserve *s;
    struct t_conn c;
    char b[X_HOLE];
    if (how & 1) {
      memset(&e, 0, sizeof e);
      CHECK(nbdserve_flat_open("mem:64K", NULL, &e) == 0);
    }
    memset(r->data + X_HOLE, 0, X_SIZE - X_HOLE);
    memset(b, 'r', sizeof b);
    config.threads = how & 2 ? 1 : 8;
    CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", how / 4) == 0);
    CHECK(t_do(&c, 0, WRITE, 0, X_HOLE, b) == 0);
    for (round = 0; round < 10; round++)
      x_round(&c, &seed);
    CHECK(t_do(&c, 0, READ, 0, 512, b) == 0); /* nothing is left over */
    t_close(&c);
    CHECK(s_end(&v) == 0);
    nbdserve_free(s);
  }
}

/* ---- Ends of clients and servers that a host notices ---- */

static int f_slow(void *ctx, const char *name, struct nbdserve_export *out) {
  (void)ctx;
  (void)out;
  CHECK(*name == 'n');
  t_sleep(5);
  return -ENOENT;
}

/* The deadline of the handshake ends it, also when there is always an option to
 * take: 600 of 5 ms each.  It was looked at only when nothing was there. */
static void u_pipelined(void) {
  struct nbdserve_config config = {0};
  static unsigned char options[600 * 23], waste[65536];
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  int64_t from;
  int i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.handshake_ms = 500;
  config.find = f_slow;
  for (i = 0; i < 600; i++) /* INFO of "n", without requests */
    memcpy(options + 23 * i, "IHAVEOPT\0\0\0\6\0\0\0\7\0\0\0\1n\0\0", 23);
  CHECK(nbdserve_new(&s, &config) == 0);
  from = t_now();
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, waste, 18) == 18 && t_write(c.fd, "\0\0\0\3", 4) == 0);
  CHECK(t_write(c.fd, options, sizeof options) == 0);
  while (read(c.fd, waste, sizeof waste) > 0)
    ;
  CHECK(s_end(&v) == -ETIMEDOUT);
  CHECK(t_now() - from >= 450 && t_now() - from < 2000);
  close(c.fd);
  nbdserve_free(s);
}

/* A request's time begins with its first byte and does not start anew with
 * another one: with stall_ms 600 a byte at 0 and one at 450 end the connection
 * at 600, not at 1050; on a busy machine at least once in some tries.  So it is
 * for a caller's socket and for one of a listener. */
static void u_total(void) {
  struct nbdserve_config config = {0};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct served v;
  struct nbdserve *s;
  struct t_conn c[2];
  pthread_t run;
  int kind, tries = 0;
  int64_t from, ms[2];
  char b;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 600;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  c[1].fd = u_dial(s);
  CHECK(pthread_create(&run, NULL, u_run, s) == 0);
  do {
    memset(&v, 0, sizeof v);
    s_start(&v, s, &c[0]);
    if (tries) c[1].fd = u_dial(NULL);
    for (kind = 0; kind < 2; kind++)
      CHECK(t_open(&c[kind], c[kind].fd, "", 0) == 0);
    from = t_now();
    for (kind = 0; kind < 2; kind++)
      CHECK(t_write(c[kind].fd, "\x25", 1) == 0);
    t_sleep(450);
    for (kind = 0; kind < 2; kind++)
      (void)t_write(c[kind].fd, "\x60", 1);
    for (kind = 0; kind < 2; kind++) {
      CHECK(t_read(c[kind].fd, &b, 1) == 0);
      ms[kind] = t_now() - from;
      CHECK(ms[kind] >= 550);
      close(c[kind].fd);
    }
    CHECK(s_end(&v) == -ETIMEDOUT);
    CHECK(++tries < 10);
  } while (ms[0] > 900 || ms[1] > 900);
  nbdserve_stop(s);
  CHECK(pthread_join(run, NULL) == 0);
  nbdserve_free(s);
}

/* Who was cut off because it did not read has not left in order, although it is
 * a worker that notices and the stream just ends for the client's thread */
static void u_unread(void) {
  struct nbdserve_config config = {0};
  struct nbdserve_export e = r_export(r_new(1 << 20), 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  int i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 100;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 1) == 0);
  for (i = 0; i < 4; i++)
    CHECK(t_send(&c, 0, READ, 1, 0, 1 << 20, NULL) == 0);
  CHECK(s_end(&v) == -ETIMEDOUT);
  close(c.fd);
  nbdserve_free(s);
}

/* Sends junk until nobody takes it any more or 3 s are over */
static void *u_pour(void *arg) {
  static const char junk[65536];
  int64_t from = t_now();
  while (t_now() - from < 3000)
    if (t_write(*(int *)arg, junk, sizeof junk)) return NULL;
  shutdown(*(int *)arg, SHUT_WR);
  return NULL;
}

/* io_linger ends with the grace, also when there is always something to throw
 * away.  It looked at the clock only when there was nothing. */
static void u_linger(void) {
  struct nbdserve *s;
  struct io io = {.stopping = 1, .stall_ms = 1000};
  pthread_t pour;
  int64_t from = t_now();
  int64_t stopped;
  int fd[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
  CHECK(nbdserve_new(&s, NULL) == 0);
  stopped = os_now_ms() + 300 - IO_GRACE_MS; /* 5 s are long for a test */
  CHECK(write(s->stop[1], &stopped, sizeof stopped) == sizeof stopped);
  io.in = io.out = fd[0];
  io.stop = s->stop[0];
  u_recv_ms = 1; /* so there is always something */
  CHECK(pthread_create(&pour, NULL, u_pour, &fd[1]) == 0);
  io_linger(&io);
  CHECK(t_now() - from >= 250 && t_now() - from < 2000);
  close(fd[0]);
  pthread_join(pour, NULL);
  close(fd[1]);
  nbdserve_free(s);
}

/* A host that has exports on demand, and counts the messages with a word */
struct listener {
  struct shelf shelf; /* first: it is f_find's ctx */
  pthread_mutex_t lock;
  const char *word;
  int times;
};

static void k_log(void *ctx, int level, const char *message) {
  struct listener *l = ctx;
  (void)level;
  pthread_mutex_lock(&l->lock);
  if (strstr(message, l->word)) l->times++;
  pthread_mutex_unlock(&l->lock);
}

static int k_times(struct listener *l) {
  int times;
  pthread_mutex_lock(&l->lock);
  times = l->times;
  pthread_mutex_unlock(&l->lock);
  return times;
}

static struct nbdserve *k_new(struct listener *l, const char *word,
                              uint32_t max_conn) {
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  memset(l, 0, sizeof *l);
  pthread_mutex_init(&l->lock, NULL);
  l->word = word;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.max_conn = max_conn;
  config.log_level = NBDSERVE_LOG_WARNING;
  config.log = k_log;
  config.find = f_find;
  config.ctx = l;
  CHECK(nbdserve_new(&s, &config) == 0);
  return s;
}

/* The totals have all calls of the backends' flush, also of exports that find
 * has made and that are gone */
static void u_counted(void) {
  struct nbdserve_stats stats;
  struct listener l;
  struct nbdserve *s = k_new(&l, "", 0);
  struct served v = {0};
  struct t_conn c;
  char b[512] = "";
  int i;
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "dyn1", 0) == 0);
  for (i = 1; i < 4; i++) {
    CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 0);
    CHECK(t_do(&c, 0, FLUSH, 0, 0, NULL) == 0);
    nbdserve_stats(s, &stats);
    CHECK(stats.flushes == (uint64_t)i);
  }
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_stats(s, &stats);
  CHECK(stats.flushes == 4); /* the last one before it was closed */
  CHECK(l.shelf.ram[0]->closes == 1 && l.shelf.ram[0]->calls[FLUSH] == 4);
  nbdserve_free(s);
}

/* Nobody else would learn that it failed */
static void u_lastflush(void) {
  struct listener l;
  struct nbdserve *s = k_new(&l, "'dyn1': the last flush", 0);
  struct served v = {0};
  struct t_conn c;
  char b[512] = "";
  int i;
  for (i = 0; i < 2; i++) { /* one that succeeds, one that fails */
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "dyn1", 0) == 0);
    CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 0);
    if (i) l.shelf.ram[l.shelf.found - 1]->flush_error = -EIO;
    t_close(&c);
    CHECK(s_end(&v) == 0);
    CHECK(k_times(&l) == i);
  }
  nbdserve_free(s);
}

/* nbdserve_free does what nbdserve_run, left with -EINTR, has not done: it
 * flushes, once, and logs what fails */
static void u_unflushed(void) {
  struct listener l;
  char b[512] = "";
  int i;
  for (i = 0; i < 2; i++) {
    struct ram *r = r_new(65536);
    struct nbdserve_export e = r_export(r, 0);
    struct nbdserve *s = k_new(&l, "'ram': the last flush", 0);
    struct served v = {0};
    struct t_conn c;
    if (i) r->flush_error = -EIO;
    CHECK(nbdserve_add(s, &e) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "", 0) == 0);
    CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 0);
    t_close(&c);
    CHECK(s_end(&v) == 0);
    nbdserve_wake(s);
    CHECK(nbdserve_run(s) == -EINTR);
    CHECK(r->calls[FLUSH] == 0 && k_times(&l) == 0);
    nbdserve_free(s);
    CHECK(r->calls[FLUSH] == 1 && r->closes == 1 && k_times(&l) == i);
  }
}

/* ---- A full server ---- */

enum {
  N_LONG = 6,          /* clients that wait at one socket */
  N_WAIT = N_LONG + 1, /* and one at the other */
  N_TURNS = 3          /* it must be one of the first that many */
};

static void n_listen(struct nbdserve *s, const char *name) {
  char address[200];
  snprintf(address, sizeof address, "unix:%s/%s", dir, name);
  CHECK(nbdserve_listen(s, address) == 0);
}

static int n_dial(const char *name) {
  struct sockaddr_un a = {0};
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  a.sun_family = AF_UNIX;
  snprintf(a.sun_path, sizeof a.sun_path, "%s/%s", dir, name);
  CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
  return fd;
}

/* Waits until one of them is greeted, which leaves: its index */
static int n_next(int fd[N_WAIT]) {
  struct pollfd p[N_WAIT];
  int i;
  for (i = 0; i < N_WAIT; i++) {
    p[i].fd = fd[i];
    p[i].events = POLLIN;
    p[i].revents = 0;
  }
  CHECK(poll(p, N_WAIT, 10000) > 0);
  for (i = 0; !p[i].revents; i++)
    ;
  close(fd[i]);
  fd[i] = -1;
  return i;
}

/* A server with two sockets and one slot, which somebody has while the others
 * begin to wait: one at that socket, the rest at the other one.  Each leaves as
 * soon as it is served.  Returns how many were served before the one. */
static int n_queue(struct listener *l, int lone) {
  static const char *const names[] = {"first", "second"};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s = k_new(l, "has to wait", 1);
  struct t_conn c;
  pthread_t run;
  int fd[N_WAIT], i, before = -1;
  CHECK(nbdserve_add(s, &e) == 0);
  n_listen(s, names[0]);
  n_listen(s, names[1]);
  c.fd = n_dial(names[0]);
  CHECK(pthread_create(&run, NULL, u_run, s) == 0);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  for (i = 0; i < N_WAIT; i++)
    fd[i] = n_dial(names[i < N_LONG ? !lone : lone]);
  for (i = 0; i < 1000 && !k_times(l); i++)
    t_sleep(10);
  CHECK(k_times(l) > 0);
  t_close(&c);
  for (i = 0; i < N_WAIT; i++)
    if (n_next(fd) == N_LONG) before = i;
  nbdserve_stop(s);
  CHECK(pthread_join(run, NULL) == 0);
  nbdserve_free(s);
  return before;
}

/* Who waits at another socket than all the others is served soon */
static void u_turns(void) {
  struct listener l;
  int lone;
  for (lone = 0; lone < 2; lone++) {
    int before = n_queue(&l, lone);
    if (before >= N_TURNS) fprintf(stderr, "%d came first\n", before);
    CHECK(before < N_TURNS);
  }
}

/* That clients wait is said once, not again for each that is served */
static void u_once(void) {
  struct listener l;
  n_queue(&l, 1);
  if (l.times != 1) fprintf(stderr, "said %d times\n", l.times);
  CHECK(l.times == 1);
}

/* ---- Adding exports meanwhile ---- */

struct adder {
  struct nbdserve *s;
  struct ram *r;
  int over; /* t_hold */
  int added;
};

static void *j_add(void *arg) {
  struct adder *a = arg;
  struct nbdserve_export e = r_export(a->r, 0);
  char name[20];
  e.name = name;
  while (!t_hold(&a->over, -1) && a->added < 500) {
    snprintf(name, sizeof name, "e%d", a->added);
    CHECK(nbdserve_add(a->s, &e) == 0);
    a->added++;
  }
  return NULL;
}

/* Exports may be added from another thread at any time, also while the server
 * flushes all that are there and ends */
static void u_adding(void) {
  int round;
  for (round = 0; round < 20; round++) {
    struct adder a = {NULL, r_new(4096), 0, 0};
    pthread_t add, run;
    CHECK(nbdserve_new(&a.s, NULL) == 0);
    CHECK(pthread_create(&run, NULL, u_run, a.s) == 0);
    CHECK(pthread_create(&add, NULL, j_add, &a) == 0);
    t_sleep(round % 4);
    nbdserve_stop(a.s);
    CHECK(pthread_join(run, NULL) == 0);
    t_hold(&a.over, 1);
    CHECK(pthread_join(add, NULL) == 0);
    CHECK(a.r->closes == 0);
    nbdserve_free(a.s);
    CHECK(a.r->closes == a.added);
  }
}

/* ---- How replies are gathered: no socket is needed ---- */

enum g_kind {
  G_WRITTEN,
  G_FAILED,  /* an error, and its place */
  G_REFUSED, /* an error with a text that is too long */
  G_SLOT,    /* a READ in its slot of wbuf */
  G_HOLE,
  G_DATA, /* a READ in a buffer of its own */
  G_STATUS,
  G_EMPTY, /* a READ of no bytes */
  G_KINDS
};
enum {
  G_N = TX_BATCH,
  G_LEN = 600, /* bytes of each READ */
  G_EXTENTS = 40
};

/* Requests that are done, and all that was gathered of their replies */
struct gathering {
  struct nbdserve_req r[G_N];
  enum g_kind kind[G_N];
  size_t n, read_head;
  unsigned char wbuf[G_N * (TX_HEAD_MAX + G_LEN)];
  unsigned char data[G_N][TX_HEAD_ROOM + G_LEN];
  int sends;
  unsigned char sent[G_N * (TX_HEAD_MAX + G_LEN)];
  size_t len;
};

/* The byte that request i is full of: not 0, which would be a hole */
static unsigned char g_byte(size_t i) {
  return (unsigned char)(i + 1);
}

/* Makes request i, whose cookie is i */
static void g_make(struct gathering *g, size_t i, enum g_kind kind,
                   enum wire_mode mode) {
  struct nbdserve_req *r = &g->r[i];
  r->type = NBD_CMD_READ;
  r->mode = mode;
  r->cookie = i;
  r->off = r->client_off = 4096 * i;
  r->len = kind == G_EMPTY ? 0 : G_LEN;
  r->state = REQ_DONE;
  r->buf = g->data[i] + TX_HEAD_ROOM;
  if (kind == G_SLOT) /* so what is between two slots stays unused */
    r->buf = g->wbuf + i * (g->read_head + G_LEN) + g->read_head;
  memset(r->buf, kind == G_HOLE ? 0 : g_byte(i), G_LEN);
  if (kind == G_WRITTEN) r->type = NBD_CMD_WRITE;
  if (kind == G_STATUS) {
    r->type = NBD_CMD_BLOCK_STATUS;
    r->data_len = G_EXTENTS;
  }
  if (kind == G_REFUSED || kind == G_FAILED) r->err = -EIO;
  if (kind == G_FAILED) r->err_has_off = 1;
  if (kind == G_FAILED) r->err_off = r->off + 7;
  if (kind == G_REFUSED)
    r->refused = "a text of more than a hundred characters, of which at most"
                 " eighty are sent, so that a head is never too long";
  g->kind[i] = kind;
  if (i) g->r[i - 1].next = r;
}

/* What tx_send_all does, but into g->sent; most: pieces in a send */
static void g_gather(struct gathering *g, int most) {
  struct nbdserve_req *rest = g->r;
  struct tx_out out;
  int i;
  do {
    struct nbdserve_req *from = rest;
    rest = tx_gather(&out, rest);
    CHECK(rest != from && out.n > 0 && out.n <= most);
    for (i = 0; i < out.n; i++) {
      CHECK(out.v[i].iov_len <= sizeof g->sent - g->len);
      memcpy(g->sent + g->len, out.v[i].iov_base, out.v[i].iov_len);
      g->len += out.v[i].iov_len;
    }
    g->sends++;
  } while (rest);
}

/* Is what follows the head of a chunk right for its request?  Its length. */
static size_t g_payload(const struct gathering *g, size_t i,
                        const unsigned char *p, unsigned type) {
  static const unsigned types[G_KINDS] = {0, 0x8002, 0x8001, 1, 2, 1, 0, 0};
  enum g_kind kind = g->kind[i];
  size_t n;
  CHECK(type == types[kind]);
  switch (kind) {
  case G_FAILED:
  case G_REFUSED:
    n = (size_t)t_get(p + 4, 2);
    CHECK(t_get(p, 4) == 5 && n > 0 && n <= 80);
    if (kind == G_REFUSED) CHECK(n == 80);
    if (kind == G_REFUSED) CHECK(!memcmp(p + 6, g->r[i].refused, n));
    if (kind == G_REFUSED) return 6 + n;
    CHECK(t_get(p + 6 + n, 8) == 4096 * i + 7);
    return 6 + n + 8;
  case G_HOLE:
    CHECK(t_get(p, 8) == 4096 * i && t_get(p + 8, 4) == G_LEN);
    return 12;
  case G_SLOT:
  case G_DATA:
    CHECK(t_get(p, 8) == 4096 * i);
    for (n = 0; n < G_LEN; n++)
      CHECK(p[8 + n] == g_byte(i));
    return 8 + G_LEN;
  default:
    return 0;
  }
}

/* Checks the reply at p, which is that to request i: its length */
static size_t g_reply(const struct gathering *g, size_t i,
                      const unsigned char *p) {
  enum wire_mode mode = g->r[i].mode;
  enum g_kind kind = g->kind[i];
  int fails = kind == G_FAILED || kind == G_REFUSED;
  size_t head = mode == MODE_EXTENDED ? 32 : 20, n;
  for (n = 0; kind == G_STATUS && n < G_EXTENTS; n++)
    CHECK(p[n] == g_byte(i)); /* whole chunks, with their heads */
  if (kind == G_STATUS) return G_EXTENTS;
  CHECK(t_get(p + 8, 8) == i);
  if (mode == MODE_SIMPLE || (mode == MODE_STRUCTURED && kind == G_WRITTEN)) {
    CHECK(t_get(p, 4) == 0x67446698 && t_get(p + 4, 4) == (fails ? 5 : 0));
    if (kind != G_SLOT && kind != G_DATA) return 16;
    for (n = 0; n < G_LEN; n++)
      CHECK(p[16 + n] == g_byte(i));
    return 16 + G_LEN;
  }
  CHECK(t_get(p, 4) == (mode == MODE_EXTENDED ? 0x6e8a278c : 0x668e33ef));
  CHECK(t_get(p + 4, 2) == 1); /* done */
  if (mode == MODE_EXTENDED) CHECK(t_get(p + 16, 8) == 4096 * i);
  n = g_payload(g, i, p + head, (unsigned)t_get(p + 6, 2));
  CHECK(mode == MODE_EXTENDED ? t_get(p + 24, 8) == n : t_get(p + 16, 4) == n);
  return head + n;
}

/* Every reply is there once, in the order of the requests */
static void g_check(const struct gathering *g) {
  const unsigned char *p = g->sent;
  size_t i;
  for (i = 0; i < g->n; i++)
    p += g_reply(g, i, p);
  CHECK(p == g->sent + g->len);
}

static struct gathering *g_new(size_t n, enum wire_mode mode) {
  struct gathering *g = t_alloc(sizeof *g);
  g->n = n;
  g->read_head = mode == MODE_EXTENDED ? 40 : mode == MODE_STRUCTURED ? 28 : 16;
  return g;
}

static void u_gather(void) {
  enum wire_mode mode;
  struct gathering *g;
  size_t i;
  for (mode = MODE_SIMPLE; mode <= MODE_EXTENDED; mode++) {
    g = g_new(G_N, mode);
    for (i = 0; i < G_N; i++) { /* of all kinds, in a wild order */
      enum g_kind kind = (enum g_kind)(i * i / 3 % G_KINDS);
      if (mode == MODE_SIMPLE && (kind == G_HOLE || kind == G_STATUS))
        kind = G_SLOT;
      if (mode == MODE_SIMPLE && kind == G_EMPTY) kind = G_WRITTEN;
      g_make(g, i, kind, mode);
    }
    g_gather(g, TX_BATCH + 2 * TX_HEADS);
    g_check(g);
    for (i = 0; mode != MODE_SIMPLE && i < 2; i++) { /* more pieces than fit */
      size_t k;
      g = g_new(G_N, mode);
      for (k = 0; k < G_N; k++)
        g_make(g, k, i && k % 3 == 0 ? G_SLOT : G_STATUS, mode);
      g_gather(g, TX_BATCH + 2 * TX_HEADS);
      g_check(g);
    }
    g = g_new(G_N, mode); /* slots side by side are one piece */
    for (i = 0; i < G_N; i++)
      g_make(g, i, G_SLOT, mode);
    g_gather(g, 1);
    CHECK(g->sends == 1);
    g_check(g);
    g = g_new(G_N, mode); /* heads without data, too */
    for (i = 0; i < G_N; i++)
      g_make(g, i, i == 5 ? G_WRITTEN : G_REFUSED, mode);
    g_gather(g, 1);
    CHECK(g->sends >= (mode == MODE_SIMPLE ? 1 : G_N / TX_HEADS));
    g_check(g);
  }
}

/* ---- What a host is promised, request by request ---- */

static int z_writes, z_bare; /* writes, and those without FUA */

static int z_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                   uint32_t f) {
  struct ram *r = ctx;
  pthread_mutex_lock(&r->lock);
  z_writes++;
  if (!(f & NBDSERVE_CMD_FUA)) z_bare++;
  pthread_mutex_unlock(&r->lock);
  return r_write(ctx, buf, off, len, f);
}

/* Zeroes that have to be written are as durable as the client has asked, in
 * each of their pieces: a backend with NATIVE_FUA sees FUA in all writes, or in
 * none, and no flush follows */
static void u_fuazero(void) {
  static const struct nbdserve_ops ops = {
      .read = r_read, .write = z_write, .flush = r_flush, .close = r_close};
  const uint32_t len = (2 << 20) + 512;
  int fua, through;
  for (through = 0; through < 2; through++)
    for (fua = 0; fua < 2; fua++) {
      struct ram *r = r_new(len);
      struct nbdserve_export e = r_export(r, NBDSERVE_EXPORT_NATIVE_FUA);
      struct one o;
      if (through) e.flags |= NBDSERVE_EXPORT_WRITETHROUGH;
      e.ops = &ops;
      z_writes = z_bare = 0;
      o_open(&o, &e, 1);
      CHECK(t_do(&o.c, fua ? FUA : 0, ZEROES, 0, len, NULL) == 0);
      CHECK(r->data[0] == 0 && r->data[len - 1] == 0);
      CHECK(z_writes >= 3 && r->calls[FLUSH] == 0);
      CHECK(z_bare == (fua || through ? 0 : z_writes));
      o_close(&o);
    }
}

/* Calls of all kinds, from several clients at once, come one at a time to a
 * SERIAL backend: also flushes and extents, which go other ways than writes */
static void u_serialmix(void) {
  static const int kinds[] = {WRITE, FLUSH, TRIM, ZEROES, STATUS, READ};
  enum {
    CLIENTS = 3,
    EACH = 24
  };
  struct ram *r = r_new(65536);
  struct nbdserve_export e = r_export(r, NBDSERVE_EXPORT_SERIAL);
  static struct t_reply reply;
  struct nbdserve *s;
  struct served v[CLIENTS];
  struct t_conn c[CLIENTS];
  char b[512] = "";
  int i, k;
  memset(v, 0, sizeof v);
  r->blocks_ms = 4;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  for (i = 0; i < CLIENTS; i++) {
    s_start(&v[i], s, &c[i]);
    CHECK(t_open(&c[i], c[i].fd, "", 1) == 0);
    for (k = 0; k < EACH; k++) {
      int kind = kinds[(i + k) % COUNT(kinds)];
      CHECK(t_send(&c[i], 0, kind, (uint32_t)k,
                   kind == FLUSH ? 0 : 512u * (unsigned)k,
                   kind == FLUSH ? 0 : 512, b) == 0);
    }
  }
  for (i = 0; i < CLIENTS; i++) {
    for (k = 0; k < EACH; k += reply.done)
      CHECK(t_recv(&c[i], &reply) && !reply.error);
    t_close(&c[i]);
    CHECK(s_end(&v[i]) == 0);
  }
  nbdserve_free(s);
  for (i = 0; i < COUNT(kinds); i++)
    CHECK(r->calls[kinds[i]] > 0);
  CHECK(r->most == 1);
}

struct lent {
  struct ram *r;
  int times;
};

static int lent_find(void *ctx, const char *name, struct nbdserve_export *out) {
  struct lent *l = ctx;
  *out = r_export(l->r, 0);
  out->min_block = strcmp(name, "blocks") == 0 ? 512 : 1;
  l->times++;
  return 0;
}

/* Who only asks about an export that was found, by INFO, by a GO that is
 * refused, or for its metadata contexts, gives it back each time */
static void u_givenback(void) {
  static const unsigned char query[] = "\0\0\0\5found\0\0\0\1"
                                       "\0\0\0\17base:allocation";
  struct nbdserve_config config = {0};
  struct lent l = {r_new(4096), 0};
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  unsigned char b[4200];
  uint32_t option;
  int i;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.find = lent_find;
  config.ctx = &l;
  CHECK(nbdserve_new(&s, &config) == 0);
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, b, 18) == 18 && t_write(c.fd, "\0\0\0\3", 4) == 0);
  CHECK(t_option(c.fd, 8, "", 0) == 0 && t_answer(c.fd, b) == 1);
  for (i = 0; i < 5; i++) {
    CHECK(t_option(c.fd, 6, "\0\0\0\5found\0\0", 11) == 0);
    CHECK(t_answer(c.fd, b) == 3 && t_answer(c.fd, b) == 1);
    for (option = 9; option <= 11; option++) { /* LIST, SET, and that again */
      CHECK(t_option(c.fd, option < 11 ? option : 10, query,
                     sizeof query - 1) == 0);
      CHECK(t_answer(c.fd, b) == 4 && t_answer(c.fd, b) == 1);
    }
    CHECK(lie_go(&c, "blocks") >> 31 == 1); /* NBD_REP_ERR_BLOCK_SIZE_REQD */
  }
  CHECK(t_option(c.fd, 2, "", 0) == 0 && t_answer(c.fd, b) == 1);
  CHECK(s_end(&v) == 0);
  CHECK(l.times >= 16 && l.r->closes == l.times);
  close(c.fd);
  nbdserve_free(s);
  CHECK(l.r->closes == l.times);
}

/* ---- Metadata contexts --------------------------------------------------- */

/* The answers to LIST or SET of contexts: "ID=NAME ", or "!TYPE " for the last
 * one if it is no ACK */
static const char *x_meta(struct t_conn *c, uint32_t option, const char *export,
                          const char *const *queries) {
  static char got[8000];
  static unsigned char p[8000];
  unsigned char b[4200];
  uint32_t type, len = (uint32_t)strlen(export), n = 0, at;
  *got = 0;
  t_put(p, 4, len);
  memcpy(p + 4, export, len);
  for (at = len + 8; queries[n]; n++) {
    len = (uint32_t)strlen(queries[n]);
    t_put(p + at, 4, len);
    memcpy(p + at + 4, queries[n], len);
    at += 4 + len;
  }
  t_put(p + 4 + strlen(export), 4, n);
  CHECK(t_option(c->fd, option, p, at) == 0);
  memset(b, 0, sizeof b);
  while ((type = t_answer(c->fd, b)) == 4) {
    sprintf(strchr(got, 0), "%u=%s ", (unsigned)t_get(b, 4), (char *)b + 4);
    memset(b, 0, sizeof b);
  }
  if (type != 1) sprintf(strchr(got, 0), "!%u ", (unsigned)type & 0xffff);
  return got;
}

/* The reply to a BLOCK_STATUS: "ID:LENGTH/STATUS,LENGTH/STATUS " for each
 * context, or "!ERROR ".  ids: the contexts that its payload names, or NULL */
static const char *x_status(struct t_conn *c, int flags, uint64_t off,
                            uint32_t len, const unsigned *ids) {
  static char got[8000];
  unsigned char payload[200];
  struct t_reply r = {0};
  uint32_t n = 8, at;
  *got = 0;
  t_put(payload, 8, len);
  for (; ids && *ids; n += 4)
    t_put(payload + n, 4, *ids++);
  if (!ids) CHECK(t_send(c, flags, STATUS, 7, off, len, NULL) == 0);
  if (ids) CHECK(t_send(c, flags | PAYLOAD, STATUS, 7, off, n, NULL) == 0);
  if (ids) CHECK(t_write(c->fd, payload, n) == 0);
  do {
    uint32_t each = c->structured > 1 ? 8 : 4;
    CHECK(t_recv(c, &r) && r.cookie == 7);
    if (r.error) {
      CHECK(r.done);
      sprintf(strchr(got, 0), "!%u ", (unsigned)r.error);
      continue;
    }
    CHECK(r.chunk == (each > 4 ? 6 : 5));
    CHECK(each == 4 || t_get(r.data + 4, 4) == (r.len - 8) / 16);
    sprintf(strchr(got, 0), "%u:", (unsigned)t_get(r.data, 4));
    for (at = each; at < r.len; at += 2 * each)
      sprintf(strchr(got, 0), "%lu/%lu%c",
              (unsigned long)t_get(r.data + at, (int)each),
              (unsigned long)t_get(r.data + at + each, (int)each),
              at + 2 * each < r.len ? ',' : ' ');
  } while (!r.done);
  free(r.data);
  return got;
}

#define X_SAYS(what, expected) \
  do { \
    const char *x_said = what; \
    if (strcmp(x_said, expected)) fprintf(stderr, "said: %s\n", x_said); \
    CHECK(!strcmp(x_said, expected)); \
  } while (0)

static int x_is_silent; /* the host says nothing of its contexts (t_hold) */

static int x_extents(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                     struct nbdserve_extents *out) {
  unsigned context = nbdserve_extents_context(out);
  (void)ctx, (void)flags;
  if (context == 0) return nbdserve_extent(out, len, 3) < 0;
  if (t_hold(&x_is_silent, -1)) return 0;
  if (context > 1) return nbdserve_extent(out, len, 0x80000000u | context) < 0;
  if (off) return nbdserve_extent(out, len, 0) < 0;
  if (nbdserve_extent(out, 100, 0) || nbdserve_extent(out, 100, 1)) return 0;
  return nbdserve_extent(out, len - 200, 0) < 0;
}

static const struct nbdserve_ops x_ops = {
    .read = r_read, .extents = x_extents, .close = r_close};

/* Begins a handshake with structured replies, or extended headers */
static void x_greet(struct t_conn *c, int structured) {
  unsigned char b[4200];
  CHECK(t_read(c->fd, b, 18) == 18 && t_write(c->fd, "\0\0\0\3", 4) == 0);
  CHECK(t_option(c->fd, structured > 1 ? 11 : 8, "", 0) == 0);
  CHECK(t_answer(c->fd, b) == 1);
  c->structured = structured;
}

/* Enters an export, with its block sizes */
static void x_enter(struct t_conn *c, const char *name) {
  CHECK(lie_go_asking(c, name, 1) == 1);
}

/* Leaves in the handshake */
static void x_abort(struct t_conn *c, struct served *v) {
  unsigned char b[4200];
  CHECK(t_option(c->fd, 2, "", 0) == 0 && t_answer(c->fd, b) == 1);
  CHECK(s_end(v) == 0);
  close(c->fd);
}

/* Which queries mean which contexts of a host's */
static void x_queries(struct t_conn *c) {
  static const struct {
    const char *query[4], *listed, *selected;
  } cases[] = {
      {{NULL}, "0=base:allocation 0=qemu:dirty-bitmap:b 0=x-t:a:b ", ""},
      {{"base:"}, "0=base:allocation ", ""},
      {{"qemu:"}, "0=qemu:dirty-bitmap:b ", ""},
      {{"qemu:dirty-bitmap:"}, "0=qemu:dirty-bitmap:b ", ""},
      {{"qemu:dirty-bitmap"}, "", ""},
      {{"qemu:dirty-bitmap:b0"}, "", ""},
      {{"qemu"}, "", ""},
      {{"x-t:"}, "0=x-t:a:b ", ""},
      {{"x-t:a:"}, "0=x-t:a:b ", ""},
      {{"", ":"}, "", ""},
      {{"x-t:a:b", "x-t:", "x-t:a:b"}, "0=x-t:a:b ", "3=x-t:a:b "},
      {{"x-t:a:b", "base:allocation"},
       "0=base:allocation 0=x-t:a:b ",
       "1=base:allocation 3=x-t:a:b "},
  };
  int i;
  for (i = 0; i < COUNT(cases); i++) {
    X_SAYS(x_meta(c, 9, "own", cases[i].query), cases[i].listed);
    X_SAYS(x_meta(c, 10, "own", cases[i].query), cases[i].selected);
  }
}

/* A host's own contexts: which there are, each in a chunk of its own, those
 * that the payload names; what shares a block is dirty, and silence an error */
static void u_contexts(void) {
  static const char *const all[] = {"x-t:a:b", "qemu:dirty-bitmap:b",
                                    "base:allocation", NULL};
  char bitmap[] = "qemu:dirty-bitmap:b", odd[] = "x-t:a:b";
  const char *contexts[] = {bitmap, odd, NULL};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s;
  int mode;
  e.name = "own";
  e.min_block = 512;
  e.ops = &x_ops;
  e.contexts = contexts;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  memset(bitmap, 'x', sizeof bitmap - 1); /* they were copied */
  for (mode = 1; mode <= 2; mode++) {
    const unsigned both[] = {3, 1, 0}, twice[] = {3, 3, 0}, more[] = {3, 4, 0};
    const unsigned none[] = {0}, four[] = {1, 2, 3, 1, 0};
    struct served v = {0};
    struct t_conn c;
    s_start(&v, s, &c);
    x_greet(&c, mode);
    x_queries(&c);
    X_SAYS(x_meta(&c, 10, "own", all),
           "1=base:allocation 2=qemu:dirty-bitmap:b 3=x-t:a:b ");
    CHECK(lie_go(&c, "own") >> 31 == 1); /* NBD_REP_ERR_BLOCK_SIZE_REQD */
    x_enter(&c, "own");
    X_SAYS(x_status(&c, 0, 0, 65536, NULL),
           "1:65536/3 2:512/1,65024/0 3:65536/2147483650 ");
    X_SAYS(x_status(&c, REQ_ONE, 0, 4096, NULL),
           "1:4096/3 2:512/1 3:4096/2147483650 ");
    t_hold(&x_is_silent, 1);
    X_SAYS(x_status(&c, 0, 512, 512, NULL), "!5 ");
    if (mode == 2) X_SAYS(x_status(&c, 0, 512, 512, both + 1), "1:512/3 ");
    t_hold(&x_is_silent, 0);
    X_SAYS(x_status(&c, 0, 512, 512, NULL),
           "1:512/3 2:512/0 3:512/2147483650 ");
    if (mode == 2) {
      X_SAYS(x_status(&c, 0, 0, 512, both), "1:512/3 3:512/2147483650 ");
      X_SAYS(x_status(&c, 0, 0, 512, twice), "!22 ");
      X_SAYS(x_status(&c, 0, 0, 512, more), "!22 ");
      X_SAYS(x_status(&c, 0, 0, 512, none), "!22 ");
      X_SAYS(x_status(&c, 0, 0, 512, four), "!22 ");
    }
    t_close(&c);
    CHECK(s_end(&v) == 0);
  }
  nbdserve_free(s);
}

static int x_many(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                  struct nbdserve_extents *out) {
  uint64_t end = off + len;
  (void)ctx, (void)flags;
  for (; off < end; off += 512)
    if (nbdserve_extent(out, 512, off / 512 % 2)) return 0;
  return 0;
}

/* A file of that size is asked for between SET and GO */
static uint64_t x_size;

static uint64_t x_resized(void *ctx, uint64_t size) {
  (void)ctx, (void)size;
  return x_size;
}

/* GO gives the size that an export has then, not when SET found it */
static void u_resizedset(void) {
  static const struct nbdserve_ops ops = {.read = r_read,
                                          .extents = r_extents,
                                          .close = r_close,
                                          .size = x_resized};
  static const char *const all[] = {"base:allocation", NULL};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  e.ops = &ops;
  x_size = 4096;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  x_greet(&c, 1);
  x_meta(&c, 10, "", all);
  x_size = 65536;
  x_enter(&c, "");
  CHECK(t_do(&c, 0, STATUS, 4096, 61440, NULL) == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

/* With a thread only, replies do not gather in memory: the second of two long
 * ones is made when the first is sent */
static int x_made; /* (t_hold) */

static int x_counted(void *ctx, uint64_t off, uint64_t len, uint32_t flags,
                     struct nbdserve_extents *out) {
  t_hold(&x_made, t_hold(&x_made, -1) + 1);
  return x_many(ctx, off, len, flags, out);
}

static void u_onethread(void) {
  static const struct nbdserve_ops ops = {
      .read = r_read, .extents = x_counted, .close = r_close};
  static const char *const all[] = {"base:allocation", NULL};
  struct nbdserve_config config = {0};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s;
  struct t_reply r = {0};
  struct served v = {0};
  struct t_conn c;
  int i;
  e.ops = &ops;
  e.size = 1 << 30;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.threads = 1;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  x_greet(&c, 1);
  x_meta(&c, 10, "", all);
  x_enter(&c, "");
  for (i = 0; i < 20; i++)
    CHECK(t_send(&c, 0, STATUS, (uint32_t)i, 0, 1u << 30, NULL) == 0);
  t_sleep(300);
  CHECK(t_hold(&x_made, -1) <= 10); /* what the socket takes */
  for (i = 0; i < 20; i++)
    CHECK(t_recv(&c, &r) && r.done && r.len == 4 + 8 * 131072);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  free(r.data);
  nbdserve_free(s);
}

/* A reply has 128 Ki extents at most, whatever contexts they are of */
static void u_manyextents(void) {
  static const char *const all[] = {"base:allocation", "x:y", NULL};
  static const struct nbdserve_ops ops = {
      .read = r_read, .extents = x_many, .close = r_close};
  const char *contexts[] = {"x:y", NULL};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s;
  unsigned n;
  e.ops = &ops;
  e.size = 1 << 30;
  e.contexts = contexts;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  for (n = 1; n <= 2; n++) {
    struct t_reply r = {0};
    struct served v = {0};
    struct t_conn c;
    unsigned i, k;
    s_start(&v, s, &c);
    x_greet(&c, 1);
    x_meta(&c, 10, "", all + 2 - n);
    x_enter(&c, "");
    CHECK(t_send(&c, 0, STATUS, 7, 1024, (1u << 30) - 1024, NULL) == 0);
    for (i = 0; i < n; i++) {
      CHECK(t_recv(&c, &r) && r.done == (i == n - 1) && r.chunk == 5);
      CHECK(t_get(r.data, 4) == (i == n - 1 ? 2 : 1));
      CHECK(r.len == 4 + 8 * (131072 / n));
      for (k = 0; k < 131072 / n; k++)
        CHECK(t_get(r.data + 4 + 8 * k, 8) == (UINT64_C(512) << 32 | k % 2));
    }
    CHECK(t_do(&c, 0, STATUS, 0, 4096, NULL) == 0);
    t_close(&c);
    CHECK(s_end(&v) == 0);
    free(r.data);
  }
  nbdserve_free(s);
}

/* Up to 16 contexts beside base:allocation are selected at once, and one more
 * selects none; names that are not possible are refused */
static void u_manycontexts(void) {
  static const char *const bad[] = {"base:x", "x",    ":x", "",
                                    "x:\xff", "x:y:", NULL};
  static char name[18][20], longest[4100];
  const char *contexts[19] = {NULL};
  const char *two[3] = {"x:y", "x:y", NULL};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve *s;
  int i, n;
  e.ops = &x_ops;
  e.contexts = two;
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == -EINVAL);
  for (i = 0; bad[i]; i++) {
    two[1] = bad[i];
    CHECK(nbdserve_add(s, &e) == -EINVAL);
  }
  memset(longest, 'x', 4097);
  longest[1] = ':';
  two[1] = longest;
  CHECK(nbdserve_add(s, &e) == -EINVAL);
  longest[4096] = 0;
  e.ops = &r_least;
  CHECK(nbdserve_add(s, &e) == -EINVAL); /* it has no extents */
  CHECK(nbdserve_flat_open("mem:64K", NULL, &e) == 0 || NBDSERVE_NO_FLAT);
  CHECK(nbdserve_add(s, &e) == -EINVAL); /* those of a file would be wrong */
  if (!NBDSERVE_NO_FLAT) e.ops->close(e.ctx);
  e = r_export(r_new(65536), 0);
  e.contexts = two;
  e.ops = &x_ops;
  CHECK(nbdserve_add(s, &e) == 0); /* for clients that ask for "" */
  for (i = 0; i < 17; i++) {
    sprintf(name[i], "x:%d", i);
    contexts[i] = name[i];
  }
  e.name = "many";
  e.contexts = contexts;
  CHECK(nbdserve_add(s, &e) == 0);
  for (n = 16; n <= 17; n++) {
    struct served v = {0};
    struct t_conn c;
    const char *p;
    s_start(&v, s, &c);
    x_greet(&c, 2);
    contexts[16] = n == 16 ? "base:allocation" : name[16];
    contexts[17] = n == 16 ? NULL : "base:allocation";
    p = x_meta(&c, 10, "many", contexts);
    CHECK(n == 16 ? strchr(p, '!') == NULL : !strcmp(p, "!9 "));
    x_enter(&c, "many");
    p = x_status(&c, 0, 0, 512, NULL);
    if (n == 17) X_SAYS(p, "!22 ");
    for (i = 0; n == 16 && i < 17; i++)
      CHECK((p = strchr(p, ' ')) != NULL && p++);
    CHECK(n == 17 || !*p);
    t_close(&c);
    CHECK(s_end(&v) == 0);
  }
  nbdserve_free(s);
}

#if !NBDSERVE_NO_CAS
static const char *x_changes[2]; /* contexts that the store's exports offer */

static int x_find(void *ctx, const char *name, struct nbdserve_export *out) {
  out->contexts = *x_changes ? x_changes : NULL;
  return nbdserve_cas_volume(ctx, name, out);
}

/* Begins a handshake that selects what has changed since v@1 and v@2 */
static void x_select(struct nbdserve *s, struct served *v, struct t_conn *c,
                     const char *name, const char *expected) {
  static const char *const queries[] = {"qemu:dirty-bitmap:2",
                                        "qemu:dirty-bitmap:1", NULL};
  s_start(v, s, c);
  x_greet(c, 1);
  X_SAYS(x_meta(c, 10, name, queries), expected);
}

/* Contexts of a store: data and changes are of the volume that SET has found,
 * whatever is called so by then; what is selected is not removed, and let go of
 * by the next SET, by entering something else and by leaving */
static void u_changes(void) {
  static const char *const none[] = {NULL};
  const char *const both = "3=qemu:dirty-bitmap:1 4=qemu:dirty-bitmap:2 ";
  char path[500];
  struct nbdserve_config config = {.version = NBDSERVE_VERSION_NUMBER,
                                   .find = x_find};
  struct nbdserve_cas *cas = config.ctx = q_new(path, "changes", 0);
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  CHECK(nbdserve_new(&s, &config) == 0);
  CHECK(nbdserve_cas_create(cas, "v", 65536) == 0);
  CHECK(nbdserve_cas_snapshot(cas, "v@1") == 0);
  q_put(cas, "v", 8192, 4096, 'a');
  CHECK(nbdserve_cas_snapshot(cas, "v@2") == 0);
  q_put(cas, "v", 20480, 10, 'b');
  x_select(s, &v, &c, "v", both);
  CHECK(nbdserve_cas_rm(cas, "v@1") == -EBUSY);
  CHECK(nbdserve_cas_rename(cas, "v", "w") == 0);
  CHECK(nbdserve_cas_rename(cas, "w@1", "w@one") == 0);
  CHECK(nbdserve_cas_create(cas, "v", 4096) == 0);
  x_enter(&c, "v");
  X_SAYS(x_status(&c, 0, 0, 65536, NULL),
         "3:8192/0,4096/1,8192/0,4096/1,40960/0 4:20480/0,4096/1,40960/0 ");
  X_SAYS(x_status(&c, 0, 4096, 8192, NULL), "3:4096/0,4096/1 4:8192/0 ");
  CHECK(nbdserve_cas_rm(cas, "w@one") == -EBUSY);
  CHECK(nbdserve_cas_rm(cas, "w") != 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  CHECK(nbdserve_cas_rename(cas, "w@one", "w@1") == 0);

  x_select(s, &v, &c, "w", both); /* SET anew */
  X_SAYS(x_meta(&c, 9, "w@2", none),
         "0=base:allocation 0=qemu:dirty-bitmap:1 ");
  CHECK(nbdserve_cas_rm(cas, "w@1") == -EBUSY);
  X_SAYS(x_meta(&c, 10, "w", none), "");
  CHECK(nbdserve_cas_rm(cas, "w@1") == 0);
  x_abort(&c, &v);
  x_select(s, &v, &c, "w", "4=qemu:dirty-bitmap:2 "); /* enters another one */
  CHECK(nbdserve_cas_rm(cas, "w@2") == -EBUSY);
  x_enter(&c, "v");
  X_SAYS(x_status(&c, 0, 0, 4096, NULL), "!22 ");
  CHECK(nbdserve_cas_snapshot(cas, "w@3") == 0);
  CHECK(nbdserve_cas_rm(cas, "w@2") == 0);
  t_close(&c);
  CHECK(s_end(&v) == 0);

  *x_changes = "qemu:dirty-bitmap:4"; /* one is offered only, if it is there */
  x_select(s, &v, &c, "w", "");
  X_SAYS(x_meta(&c, 9, "w", none), "0=base:allocation ");
  CHECK(nbdserve_cas_snapshot(cas, "w@4") == 0);
  X_SAYS(x_meta(&c, 9, "w", none), "0=base:allocation 0=qemu:dirty-bitmap:4 ");
  x_abort(&c, &v);
  *x_changes = NULL;
  nbdserve_free(s);
  CHECK(nbdserve_cas_rm(cas, "w@3") == 0); /* nothing is left open */
  CHECK(nbdserve_cas_rm(cas, "w@4") == 0);
  CHECK(nbdserve_cas_rm(cas, "w") == 0);
  CHECK(nbdserve_cas_close(cas) == 0);
}

/* What is lost counts as changed, also against itself */
static void u_lostchanges(void) {
  struct cas_volume *vol[2];
  struct nbdserve_export big = {0};
  uint64_t n;
  int64_t start;
  char path[500];
  unsigned char room[16 * 20];
  struct nbdserve_cas *cas = q_new(path, "lostchanges", 0);
  struct nbdserve_extents x = {.align = 1, .max = 20, .each = 16};
  struct nbdserve_export e = {0};
  struct cas_spot spot;
  CHECK(nbdserve_cas_create(cas, "v", 65536) == 0);
  q_put(cas, "v", 8192, 4096, 'a');
  CHECK(nbdserve_cas_snapshot(cas, "v@1") == 0);
  q_put(cas, "v", 20480, 4096, 'b');
  CHECK(nbdserve_cas_volume(cas, "v@1", &e) == 0);
  CHECK(!cas_walk(cas, *cas_root(e.ctx), 2, &spot));
  spot.leaf->slots[2] = CAS_LOST;
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_volume(cas, "v", &e) == 0);
  CHECK(!cas_walk(cas, *cas_root(e.ctx), 2, &spot));
  spot.leaf->slots[2] = CAS_LOST;
  x.context = cas_find(cas, "v@1", 3, VIEW_NOW)->id;
  x.left = 65536;
  x.data = room;
  CHECK(e.ops->extents(e.ctx, 0, 65536, 0, &x) == 0 && x.n == 5);
  CHECK(t_get(x.data, 8) == 8192 && t_get(x.data + 8, 8) == 0);
  CHECK(t_get(x.data + 16, 8) == 4096 && t_get(x.data + 24, 8) == 1);
  CHECK(t_get(x.data + 48, 8) == 4096 && t_get(x.data + 56, 8) == 1);
  e.ops->close(e.ctx);

  /* a volume of which nothing is left is compared at once */
  CHECK(nbdserve_cas_create(cas, "w", UINT64_C(1) << 46) == 0);
  CHECK(nbdserve_cas_snapshot(cas, "w@1") == 0);
  CHECK(nbdserve_cas_volume(cas, "w", &big) == 0);
  vol[1] = big.ctx;
  CHECK(nbdserve_cas_volume(cas, "w@1", &big) == 0);
  vol[0] = big.ctx;
  *cas_root(vol[1]) = cas_new_node(CAS_LEVELS - 1, 0, CAS_LOST);
  start = os_now_ms();
  CHECK(cas_same(cas, vol, 0, &n) == -EUCLEAN && n == UINT64_C(1) << 34);
  CHECK(os_now_ms() - start < 1000);
  _exit(0); /* the store is not to be written now */
}
#else
static void u_changes(void) {}

static void u_lostchanges(void) {}
#endif

static int h_holds; /* writes do not return (t_hold) */

static int h_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                   uint32_t f) {
  while (t_hold(&h_holds, -1))
    t_sleep(1);
  return r_write(ctx, buf, off, len, f);
}

/* A client that writes more than a host's backend can take is not heard any
 * more: as many requests as there are threads hold their data, one waits for a
 * thread, and a part of another one is on its way */
static void u_fullhands(void) {
  static const struct nbdserve_ops ops = {.read = r_read, .write = h_write};
  static unsigned char request[28 + (1 << 20)];
  enum {
    THREADS = 4,
    SENT_MOST = 12
  };
  struct nbdserve_config config = {0};
  struct nbdserve_export e = r_export(r_new(1 << 20), 0);
  static struct t_reply reply;
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  size_t sent = 0, whole;
  e.ops = &ops;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.threads = THREADS;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  t_hold(&h_holds, 1);
  t_head(request, 0, WRITE, 1, 0, 1 << 20);
  while (sent < SENT_MOST * sizeof request) { /* until it takes no more */
    struct pollfd p = {.fd = c.fd, .events = POLLOUT};
    size_t at = sent % sizeof request;
    ssize_t n;
    if (poll(&p, 1, 400) == 0 && sent > THREADS * sizeof request) break;
    n = send(c.fd, request + at, sizeof request - at,
             MSG_DONTWAIT | MSG_NOSIGNAL);
    CHECK(n >= 0 || errno == EAGAIN);
    if (n > 0) sent += (size_t)n;
  }
  t_hold(&h_holds, 0);
  whole = (sent + sizeof request - 1) / sizeof request;
  if (whole > THREADS + 2) fprintf(stderr, "took %d\n", (int)whole);
  CHECK(whole > THREADS && whole <= THREADS + 2);
  if (sent % sizeof request) /* what was begun is ended, and all is answered */
    CHECK(t_write(c.fd, request + sent % sizeof request,
                  sizeof request - sent % sizeof request) == 0);
  while (whole-- > 0)
    CHECK(t_recv(&c, &reply) && !reply.error);
  t_close(&c);
  CHECK(s_end(&v) == 0);
  nbdserve_free(s);
}

/* The time of the handshake runs from its first moment: a client that is
 * greeted and says nothing has handshake_ms, not the stall_ms of others */
static void u_silent(void) {
  struct nbdserve_config config = {0};
  struct nbdserve *s;
  struct served v = {0};
  struct t_conn c;
  struct pollfd p = {.events = POLLIN};
  char b[18];
  int64_t ms, from = t_now();
  config.version = NBDSERVE_VERSION_NUMBER;
  config.handshake_ms = 300;
  config.stall_ms = 5000;
  CHECK(nbdserve_new(&s, &config) == 0);
  s_start(&v, s, &c);
  CHECK(t_read(c.fd, b, 18) == 18);
  p.fd = c.fd;
  CHECK(poll(&p, 1, 3000) == 1 && t_read(c.fd, b, 1) == 0);
  ms = t_now() - from;
  if (ms < 290 || ms >= 1500) fprintf(stderr, "after %d ms\n", (int)ms);
  CHECK(ms >= 290 && ms < 1500);
  CHECK(s_end(&v) == -ETIMEDOUT);
  close(c.fd);
  nbdserve_free(s);
}

/* ---- Ends that come at once ---- */

/* Sends FLUSHes until nobody takes them any more or 5 s are over */
static void *u_flood(void *arg) {
  static unsigned char many[1000 * 28];
  int64_t from = t_now();
  int i;
  for (i = 0; i < 1000; i++)
    t_head(many + 28 * i, 0, FLUSH, (uint32_t)i, 0, 0);
  while (t_now() - from < 5000)
    if (t_write(*(int *)arg, many, sizeof many)) return NULL;
  shutdown(*(int *)arg, SHUT_WR);
  return NULL;
}

/* Takes what is sent until the end */
static void *u_drain(void *arg) {
  static char waste[65536];
  while (read(*(int *)arg, waste, sizeof waste) > 0)
    ;
  return NULL;
}

/* A client that never pauses cannot keep the server from stopping: it takes
 * what had arrived by then and not what comes later */
static void u_flooded(void) {
  struct nbdserve_export e = r_export(r_new(4096), 0);
  pthread_t flood, drain;
  struct one o;
  int64_t from;
  u_recv_ms = 1; /* so there is always something */
  o_open(&o, &e, 0);
  CHECK(pthread_create(&drain, NULL, u_drain, &o.c.fd) == 0);
  CHECK(pthread_create(&flood, NULL, u_flood, &o.c.fd) == 0);
  t_sleep(100);
  from = t_now();
  nbdserve_stop(o.s);
  CHECK(s_end(&o.v) == 0);
  CHECK(t_now() - from < 2000);
  pthread_join(flood, NULL);
  pthread_join(drain, NULL);
  close(o.c.fd);
  nbdserve_free(o.s);
}

/* When a worker cannot send its reply the connection ends then, although the
 * client's thread waits for a request and could go on with that for stall_ms:
 * nothing comes, nor does the end, as the client has closed one side only */
static void u_sendfails(void) {
  struct nbdserve_config config = {0};
  struct ram *r = r_new(4096);
  struct nbdserve_export e = r_export(r, 0);
  struct served v = {0};
  struct nbdserve *s;
  struct t_conn c;
  int64_t from;
  config.version = NBDSERVE_VERSION_NUMBER;
  config.stall_ms = 6000;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  s_start(&v, s, &c);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  r->blocks_ms = 100; /* by then the client's thread waits */
  from = t_now();
  CHECK(t_send(&c, 0, READ, 1, 0, 512, NULL) == 0);
  CHECK(shutdown(c.fd, SHUT_RD) == 0);
  CHECK(s_end(&v) == -EPIPE);
  CHECK(t_now() - from < 3000);
  close(c.fd);
  nbdserve_free(s);
}

/* A temporary export leaves no descriptor open when it is closed */
static void u_closed(void) {
  struct nbdserve_flat flat = {.flags = NBDSERVE_FLAT_TEMPORARY};
  int round, before = u_descriptors();
  for (round = 0; round < 20; round++) {
    struct nbdserve_export e = {0};
    flat.dir = round & 1 ? dir : NULL;
    CHECK(nbdserve_flat_open("mem:1M", &flat, &e) == 0);
    CHECK(u_descriptors() > before);
    e.ops->close(e.ctx);
    CHECK(u_descriptors() == before);
  }
}

/* Who comes in the same moment as another one does not get a slot that is not
 * there: with one slot two clients wait, each at a socket of its own, before
 * the server looks for the first time */
static void u_sametime(void) {
  struct listener l;
  struct nbdserve *s = k_new(&l, "has to wait", 1);
  struct nbdserve_stats stats;
  pthread_t run;
  int fd[2], i;
  n_listen(s, "first");
  n_listen(s, "second");
  fd[0] = n_dial("first");
  fd[1] = n_dial("second");
  CHECK(pthread_create(&run, NULL, u_run, s) == 0);
  for (i = 0; i < 1000; i++) {
    int waits = k_times(&l); /* it has looked at both */
    nbdserve_stats(s, &stats);
    CHECK(stats.clients_now <= 1);
    if (waits) break;
    t_sleep(10);
  }
  CHECK(i < 1000 && stats.clients_now == 1);
  close(fd[0]);
  close(fd[1]);
  nbdserve_stop(s);
  CHECK(pthread_join(run, NULL) == 0);
  nbdserve_free(s);
}

/* nbdserve_run tells of a last flush that fails, whether it is that of the
 * first export or of the second */
static void u_oneflush(void) {
  int which, i;
  for (which = 0; which < 2; which++) {
    struct ram *r[2];
    struct nbdserve *s;
    CHECK(nbdserve_new(&s, NULL) == 0);
    for (i = 0; i < 2; i++) {
      struct nbdserve_export e = r_export(r[i] = r_new(4096), 0);
      e.name = i ? "second" : "first";
      if (i == which) r[i]->flush_error = -EIO;
      CHECK(nbdserve_add(s, &e) == 0);
    }
    nbdserve_stop(s);
    CHECK(nbdserve_run(s) == -EIO);
    for (i = 0; i < 2; i++)
      CHECK(r[i]->calls[FLUSH] == 1);
    nbdserve_free(s);
  }
}

//== unit
/* ---- What an export is like ---------------------------------------------- */

static struct nbdserve_info g_told;
static int g_fd;

static void g_entered(void *ctx, int in_fd, const char *name,
                      const struct nbdserve_info *info) {
  CHECK(ctx == &g_told && !strcmp(name, "e"));
  g_fd = in_fd;
  g_told = *info;
}

/* nbdserve_info says what a client is told, by `entered`, too. */
static void u_info(void) {
  struct nbdserve_config config = {
      .version = NBDSERVE_VERSION_NUMBER, .entered = g_entered, .ctx = &g_told};
  struct nbdserve_export e = r_export(r_new(65536), 0);
  struct nbdserve_info info;
  struct nbdserve *s;
  int i;
  e.name = "e";
  e.preferred_block = 8192;
  e.max_request = 1 << 20;
  CHECK(nbdserve_new(&s, &config) == 0 && nbdserve_add(s, &e) == 0);
  CHECK(nbdserve_info(s, "f", &info) == -ENOENT);
  for (i = 0; i < 2; i++) {
    struct served v = {0};
    struct t_conn c;
    CHECK(nbdserve_info(s, i ? NULL : "e", &info) == 0);
    s_start(&v, s, &c);
    CHECK(t_open(&c, c.fd, "e", 0) == 0);
    CHECK(info.size == c.size && info.size == (i ? 4096 : 65536));
    CHECK(info.min_block == 1 && info.preferred_block == 8192);
    CHECK(info.max_request == 1 << 20);
    t_close(&c);
    CHECK(s_end(&v) == 0);
    CHECK(g_fd == v.fd && g_told.size == info.size);
    CHECK((g_told.flags & ~(uint32_t)NBD_FLAG_SEND_DF) == info.flags);
    CHECK(info.flags & NBD_FLAG_SEND_FLUSH && info.flags & 1);
    CHECK(nbdserve_resize(s, "e", 4096) == 0);
  }
  nbdserve_free(s);
}

#if !NBDSERVE_NO_CAS && !NBDSERVE_NO_CLIENT
/* ---- A store at the far end that lies ------------------------------------ */

static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  sha_256(0, p, NULL, n, sum, NULL);
}

/* The store that pulls, and what went wrong with the peer */
static struct nbdserve_cas *far_cas;
static char far_why[200];

/* Pulls v@s, with a limit of ms for the peer. */
static int far_pull(struct far_end *end, const struct far *far,
                    const char *from, int ms) {
  struct nbdserve_peer peer = {.stall_ms = (uint32_t)ms};
  int err;
  peer.in_fd = peer.out_fd = far_start(end, far);
  err = nbdserve_cas_pull(far_cas, "v@s", from, &peer);
  far_stop(end, peer.in_fd);
  strcpy(far_why, peer.why);
  return err;
}

static int far_damage(void *arg, const char *name, uint64_t off, uint64_t len,
                      const char *why) {
  (void)off, (void)len, (void)name, (void)why;
  ++*(int *)arg;
  return 0;
}

/* Every block of the volume that an interrupted pull has left is that of the
 * snapshot or was not there yet.  How many are there; -1: there is none. */
static int far_partial(const struct far *far) {
  unsigned char b[4096];
  struct cas_volume *vol = NULL;
  uint64_t i;
  int n = 0;
  os_lock(&far_cas->lock);
  for (i = 0; i < far_cas->nvolumes; i++)
    if (!strcmp(far_cas->volumes[i]->now.name, far->part))
      vol = far_cas->volumes[i];
  os_unlock(&far_cas->lock);
  if (!vol) return -1;
  CHECK(vol->now.flags == CAS_IS_PARTIAL && vol->now.size == far->size);
  for (i = 0; i < far->blocks; i++) {
    CHECK(ex_batched_read(vol, b, i * 4096, u_min(4096, far->size - i * 4096),
                          0) == 0);
    if (!memcmp(b, far_block(far, i), u_min(4096, far->size - i * 4096)))
      n += !far_is_zero(b, u_min(4096, far->size - i * 4096));
    else
      CHECK(far_is_zero(b, u_min(4096, far->size - i * 4096)));
  }
  return n;
}

static int far_remove(void *arg, const struct nbdserve_cas_info *info) {
  (void)arg;
  return strncmp(info->name, "sha256-", 7) ||
         nbdserve_cas_rm(far_cas, info->name);
}

/* What a pull that failed leaves: nothing of that name, and a sound store. */
static void far_unharmed(void) {
  struct nbdserve_export e = {0};
  int n = 0;
  CHECK(nbdserve_cas_volume(far_cas, "v@s", &e) == -ENOENT);
  CHECK(nbdserve_cas_volume(far_cas, "v", &e) == -ENOENT);
  CHECK(!strstr(q_ids(far_cas), "v="));
  CHECK(!strstr(q_ids(far_cas), "v@s="));
  CHECK(nbdserve_cas_verify(far_cas, far_damage, NULL, &n) == 0 && n == 0);
}

/* An honest pull ends with the id and the contents, and VOL has them, too. */
static void far_honest(const struct far *far) {
  static const char *const names[] = {"v@s", "v"};
  struct far_end end = {0};
  char id[72];
  unsigned char *b = malloc((size_t)far->size + 1);
  int i;
  CHECK(far_pull(&end, far, far->id, 20000) == 0);
  CHECK(nbdserve_cas_seal(far_cas, "v@s", id, NULL, NULL) == 0);
  CHECK(!strcmp(id, far->id) && b);
  for (i = 0; i < 2; i++) {
    CHECK(!far->size || q_get(far_cas, names[i], 0, far->size, b) == 0);
    CHECK(!memcmp(b, far->b + far->data, (size_t)far->size));
    CHECK(nbdserve_cas_rm(far_cas, names[i]) == 0);
  }
  CHECK(far_partial(far) == -1);
  free(b);
}

/* Blocks: some of their own, some alike, some zero, in several runs */
static void far_fill(struct far *far, uint64_t size, unsigned seed) {
  uint64_t i;
  far_make(far, 4096, 1016, size);
  for (i = 0; i < far->blocks; i++) {
    unsigned char *p = far_block(far, i);
    uint64_t n = u_min(4096, size - i * 4096);
    uint64_t x = seed * 100000u + (i % 7 == 5 ? 5 : i);
    if (i % 4 == 2 || (i > 40 && i < far->blocks - 9)) continue;
    memset(p, (int)(1 + x % 250), (size_t)n);
    far_put(p, n < 8 ? n : 8, x + 1);
  }
  far_seal(far);
}

static struct nbdserve_cas *far_store(const char *name) {
  char path[500];
  far_cas = q_new(path, name, 0);
  return far_cas;
}

#define G FAR_GREETING
#define O FAR_OPTION
#define A FAR_ANSWER
/* One lie, what it leads to, and a part of what is said of it */
static const struct {
  struct far_lie lie;
  int err;
  const char *why;
} far_lies[] = {
    {{G, 0, 0, 8, UINT64_C(0x4e42444d41474943) + 1}, -EPROTO, "no NBD"},
    {{G, 0, 0, 8, 0}, -EPROTO, "no NBD"},
    {{G, 0, 8, 8, UINT64_C(0x00420281861253)}, -EPROTO, "old"},
    {{G, 0, 16, 2, 0}, -EPROTO, "old"},
    {{G, 0, 16, 2, 2}, -EPROTO, "old"},
    {{G, 0, 0, 1, 0xee}, -EPROTO, "no NBD"},
    {{O, 0, 0, 8, 0}, -EPROTO, "haggles"},
    {{O, 0, 7, 1, 0xa8}, -EPROTO, "haggles"},
    {{O, 1, 8, 4, 1}, -EPROTO, "haggles"},
    {{O, 2, 8, 4, 6}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 0xffffffff}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 0x80000000}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 0x7fffffff}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 65536}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 4099}, -EPROTO, "haggles"},
    {{O, 2, 16, 4, 0xffffffff}, -EPROTO, "haggles"},
    {{O, 0, 16, 4, 0}, -EPROTO, "haggles"}, /* what follows is out of step */
    {{O, 0, 16, 4, 11}, -EPROTO, "haggles"},
    {{O, 1, 16, 4, 1}, -EPROTO, "haggles"},
    {{O, 0, 12, 4, 0x80000001}, -ENOENT, "refuses"},
    {{O, 1, 12, 4, 0x80000009}, -ENOENT, "refuses"},
    {{O, 2, 12, 4, 0xffffffff}, -ENOENT, "refuses"},
    {{O, 0, 20, 2, 9}, -ETIMEDOUT, "says nothing"}, /* ACK, but no size */
    {{O, 2, 12, 4, 3}, -ETIMEDOUT, "says nothing"}, /* no ACK */
    {{O, 2, 12, 4, 2}, -ETIMEDOUT, "says nothing"},
    {{O, 0, 22, 8, 0}, -EPROTO, "size"},
    {{O, 0, 22, 8, UINT64_C(1) << 63}, -EPROTO, "size"},
    {{O, 0, 22, 8, UINT64_MAX}, -EPROTO, "size"},
    {{O, 0, 22, 8, INT64_MAX}, -EPROTO, "sizes make no sense"},
    {{O, 0, 22, 8, 4096}, -EPROTO, "sizes make no sense"},
    {{O, 0, 22, 8, 1 << 20}, -EPROTO, "sizes make no sense"},
    {{O, 1, 22, 4, 8192}, -EPROTO, "block sizes"},
    {{O, 1, 22, 4, 0xffffffff}, -EPROTO, "block sizes"},
    {{O, 1, 30, 4, 65536}, -EPROTO, "block sizes"},
    {{O, 1, 30, 4, 0}, -EPROTO, "block sizes"},
    {{A, 0, 16, 8, 0}, -EPROTO, "not of a store"},
    {{A, 0, 23, 1, 'l'}, -EPROTO, "not of a store"},
    {{A, 0, 24, 4, 0}, -EPROTO, "not of a store"},
    {{A, 0, 24, 4, 2}, -EPROTO, "not of a store"},
    {{A, 0, 28, 4, 0}, -EINVAL, "blocks have 0 bytes"},
    {{A, 0, 28, 4, 8192}, -EINVAL, "blocks have 8192 bytes"},
    {{A, 0, 28, 4, 0xffffffff}, -EINVAL, "blocks have 4294967295 bytes"},
    {{A, 0, 32, 8, 0}, -EPROTO, "sizes make no sense"},
    {{A, 0, 32, 8, 4096}, -EPROTO, "sizes make no sense"},
    {{A, 0, 32, 8, INT64_MAX}, -EPROTO, "sizes make no sense"},
    {{A, 0, 32, 8, UINT64_C(1) << 63}, -EPROTO, "sizes make no sense"},
    {{A, 0, 32, 8, UINT64_MAX}, -EPROTO, "sizes make no sense"},
    {{A, 0, 40, 8, 0}, -EBADMSG, "does not fit the id"},
    {{A, 0, 71, 1, 0xee}, -EBADMSG, "does not fit the id"},
    {{A, 0, 16, 1, 0xee}, -EPROTO, "not of a store"},
    {{A, 1, 16, 8, 0}, -EBADMSG, "tree does not fit"},
    {{A, 1, 47, 1, 0}, -EBADMSG, "tree does not fit"},
    {{A, 1, 16, 1, 0xee}, -EBADMSG, "tree does not fit"},
    {{A, 3, 16, 8, 0}, -EBADMSG, "tree does not fit"},
    {{A, 3, 47, 1, 0}, -EBADMSG, "tree does not fit"},
    {{A, 4, 16, 8, 0}, -EBADMSG, "tree does not fit"},
    {{A, 4, 16 + 32, 8, 0}, -EBADMSG, "tree does not fit"}, /* second leaf */
    {{A, 5, 16, 8, 0}, -EBADMSG, "tree does not fit"},
    {{A, 5, 16 + 1015 * 32, 8, 7}, -EBADMSG, "tree does not fit"},
    {{A, 6, 16 + 3840, 8, 7}, -EBADMSG, "tree does not fit"},
    {{A, 7, 16, 8, 0}, -EBADMSG, "blocks do not fit"},
    {{A, 7, 16 + 4095, 1, 0}, -EBADMSG, "blocks do not fit"},
    {{A, 7, 16 + 4096, 8, 0}, -EBADMSG, "blocks do not fit"},
    {{A, 8, 16, 8, 0}, -EBADMSG, "blocks do not fit"},
    {{A, 18, 16, 8, 0}, -EBADMSG, "blocks do not fit"},
    {{A, 0, 0, 4, 0x67446699}, -EPROTO, "make no sense"},
    {{A, 0, 0, 4, 0x668e33ef}, -EPROTO, "make no sense"}, /* structured */
    {{A, 7, 0, 4, 0x668e33ef}, -EPROTO, "make no sense"},
    {{A, 7, 0, 4, 0x25609513}, -EPROTO, "make no sense"},
    {{A, 0, 8, 8, 1}, -EPROTO, "make no sense"}, /* cookies not sent yet */
    {{A, 0, 8, 8, UINT64_MAX}, -EPROTO, "make no sense"},
    {{A, 5, 8, 8, 2}, -EPROTO, "make no sense"},
    {{A, 7, 8, 8, 16}, -EPROTO, "make no sense"},
    {{A, 8, 8, 8, 0}, -EPROTO, "make no sense"}, /* that was answered */
    {{A, 9, 8, 8, 0}, -EPROTO, "make no sense"},
    {{A, 0, 4, 4, 5}, -EIO, "cannot read at 0"},
    {{A, 1, 4, 4, 22}, -EIO, "cannot read at 4096"},
    {{A, 3, 4, 4, 1}, -EIO, "cannot read"},
    {{A, 4, 4, 4, 28}, -EIO, "cannot read"},
    {{A, 5, 4, 4, 108}, -EIO, "cannot read"},
    {{A, 6, 4, 4, 0xffffffff}, -EIO, "cannot read"},
    {{A, 7, 4, 4, 5}, -EIO, "cannot read at 1048576"},
    {{A, 10, 4, 4, 5}, -EIO, "cannot read"},
};
#undef G
#undef O
#undef A

/* Whatever a peer lies about, at each place of the conversation: an error and a
 * message, nothing of that name, a sound store, and then an honest pull. */
static void u_farlies(void) {
  int i, named, before = u_descriptors();
  struct far far;
  far_store("farlies");
  far_fill(&far, 1030 * 4096 - 100, 1);
  before = u_descriptors();
  for (named = 0; named < 2; named++)
    for (i = 0; i < COUNT(far_lies); i++) {
      struct far_lie lies[2] = {far_lies[i].lie};
      struct far_end end = {.t = {.lies = lies}};
      if (lies->nth > 0 && named != i % 2)
        continue; /* the name is of no account */
      int ms = far_lies[i].err == -ETIMEDOUT ? 50 : 5000;
      const char *why = far_lies[i].why;
      int err = far_pull(&end, &far, named ? "name" : far.id, ms);
      if (!named && lies->kind == FAR_ANSWER && lies->nth == 0 &&
          lies->off >= 40 && far_lies[i].err == -EBADMSG)
        why = "another id";
      if (err != far_lies[i].err || !*far_why || !strstr(far_why, why))
        fprintf(stderr, "lie %d (%d %d %d): %d, '%s'\n", i, (int)lies->kind,
                lies->nth, (int)lies->off, err, far_why);
      CHECK(err == far_lies[i].err && strstr(far_why, why));
      CHECK(strspn(far_why, "\033\n\t") == 0);
      CHECK(*far_why || !*why);
      far_unharmed();
      CHECK(u_descriptors() == before);
      if (i % 8 == 0) far_honest(&far); /* which goes on with what is there */
      CHECK(nbdserve_cas_list(far_cas, far_remove, NULL) == 0);
    }
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* What is no lie: answers in another order, garbage where nothing is looked at,
 * a byte at a time, 61 replies before those that count; but not 64. */
static void u_farodd(void) {
  static const struct far_lie garbage[] = {
      {FAR_ANSWER, 1, 16 + 32, 1, 0xee},
      {FAR_ANSWER, 4, 16 + 64, 1, 0xee},
      {FAR_ANSWER, 6, 16, 8, 0xee}, /* of the leaf before it */
      {FAR_ANSWER, 6, 16 + 3840 + 14 * 32, 1, 0xee},
      {FAR_ANSWER, 0, 16 + 56, 1, 0xee},
      {FAR_OPTION, 1, 20, 2, 77},
      {FAR_OPTION, 0, 30, 2, 0xffff},
      {FAR_KINDS, 0, 0, 0, 0}};
  struct far far;
  int i;
  far_store("farodd");
  far_fill(&far, 1030 * 4096 - 100, 2);
  for (i = 0; i < 6; i++) {
    struct far_end end = {.t = {.lies = i == 1 ? garbage : NULL,
                                .reverse = i == 0,
                                .haggles = i == 3   ? 61
                                           : i == 4 ? 62
                                           : i == 5 ? 1000
                                                    : 0},
                          .each = i == 2 ? 1 : 0};
    int err = far_pull(&end, &far, "x", 20000);
    CHECK(err == (i < 4 ? 0 : -EPROTO));
    if (!err) {
      char id[72];
      CHECK(nbdserve_cas_seal(far_cas, "v@s", id, NULL, NULL) == 0);
      CHECK(!strcmp(id, far.id));
      CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
      CHECK(nbdserve_cas_rm(far_cas, "v") == 0);
    }
  }
  CHECK(strstr(far_why, "haggles"));
  far_unharmed();
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* A peer that does one request at a time, and hears of no other one until its
 * answer is gone, over pipes that hold little: nobody waits for the other. */
static void u_farnarrow(void) {
  struct far far;
  struct far_end end = {.left = SIZE_MAX, .each = SIZE_MAX, .ear = 28};
  struct nbdserve_peer peer = {.stall_ms = 5000};
  int to[2], back[2];
  uint64_t i;
  far_store("farnarrow");
  far_make(&far, 4096, 1016, 1000 * 4096);
  for (i = 0; i < far.blocks; i += 2)
    far_put(far_block(&far, i), 8, i + 1);
  far_seal(&far);
  CHECK(pipe(to) == 0 && pipe(back) == 0);
#ifdef F_SETPIPE_SZ
  CHECK(fcntl(to[1], F_SETPIPE_SZ, 4096) == 4096);
  CHECK(fcntl(back[1], F_SETPIPE_SZ, 4096) == 4096);
#endif
  end.from = to[0];
  end.fd = back[1];
  far_begin(&end.t, &far);
  CHECK(pthread_create(&end.thread, NULL, far_run, &end) == 0);
  peer.in_fd = back[0];
  peer.out_fd = to[1];
  CHECK(nbdserve_cas_pull(far_cas, "v@s", "x", &peer) == 0);
  close(to[1]);
  far_stop(&end, back[0]);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* A peer that is silent, or says a byte now and then, ends by the limit: the
 * handshake as a whole, and each move after it.  So does progress, at once. */
static int far_cancel(void *arg, uint64_t done, uint64_t total) {
  (void)done, (void)total;
  return ++*(int *)arg > 4;
}
static void u_farstall(void) {
  static const size_t after[] = {0, 1, 18, 19, 50, 104, 121, 4300, 9000, 60000};
  struct far far;
  int i;
  far_store("farstall");
  far_fill(&far, 1030 * 4096 - 100, 3);
  for (i = 0; i < COUNT(after); i++) {
    struct far_end end = {.left = after[i], .then = 1};
    int64_t from = t_now();
    CHECK(far_pull(&end, &far, "x", 40) == -ETIMEDOUT);
    CHECK(strstr(far_why, "says nothing") && t_now() - from < 5000);
    far_unharmed();
  }
  for (i = 0; i < 2; i++) { /* 104 bytes are the handshake's */
    struct far_end end = {.each = 1, .sleeps = 3};
    int64_t from = t_now();
    CHECK(far_pull(&end, &far, "x", 200) == -ETIMEDOUT);
    CHECK(t_now() - from < 5000);
  }
  for (i = 0; i < 2; i++) {
    struct far_end end = {.left = i ? 5000 : 0, .then = 1};
    int calls = 0, fd = far_start(&end, &far);
    struct nbdserve_peer peer = {
        .in_fd = fd, .out_fd = fd, .progress = far_cancel, .arg = &calls};
    CHECK(nbdserve_cas_pull(far_cas, "v@s", "x", &peer) == -ECANCELED);
    CHECK(calls > 4 && calls < 20);
    far_stop(&end, fd);
    far_unharmed();
  }
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* What a peer says to a pull, all of it, in one go */
static size_t far_record(const struct far *far, unsigned char **said) {
  struct far_end end = {0};
  struct nbdserve_peer peer = {.stall_ms = 20000};
  peer.in_fd = peer.out_fd = far_start(&end, far);
  CHECK(nbdserve_cas_pull(far_cas, "v@s", "x", &peer) == 0);
  close(peer.in_fd);
  pthread_join(end.thread, NULL);
  *said = end.t.out;
  CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
  CHECK(nbdserve_cas_rm(far_cas, "v") == 0);
  return end.t.nout;
}

/* The conversation ends after n bytes, for every n: -EPIPE, or the id.  Of the
 * end every how many bytes is looked at everywhere, and every one around the
 * places where a message begins or ends. */
static void u_farcut(void) {
  struct far far;
  unsigned char *said;
  size_t n, all;
  int size = 1 << 18, edge;
  int64_t from = t_now();
  far_store("farcut");
  far_fill(&far, 3 * 4096 + 1, 4);
  all = far_record(&far, &said);
  CHECK(all > 5 * 4096 && all < 1 << 17);
  for (n = 0; n < all; n++) {
    struct nbdserve_peer peer = {.stall_ms = 20000};
    size_t at = n < 104 ? 0 : (n - 104) % (16 + 4096);
    int fd[2], err;
    edge = n < 400 || at < 40 || at > 4080 || n > all - 20;
    if (!edge && n % 13) continue;
    if (n % 17 && t_now() - from > 6000) continue; /* under a sanitizer */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    CHECK(t_write(fd[0], said, n) == 0 && shutdown(fd[0], SHUT_WR) == 0);
    peer.in_fd = peer.out_fd = fd[1];
    err = nbdserve_cas_pull(far_cas, "v@s", "x", &peer);
    CHECK(err == -EPIPE && strstr(peer.why, "hung up"));
    if (n % 3 == 0) close(fd[0]);
    if (n % 3) close(fd[0]);
    close(fd[1]);
    if (n % 64 == 0 || n == all - 1) far_unharmed();
    if (n % 64 == 0) CHECK(far_partial(&far) <= 0);
  }
  free(said);
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* A peer that goes while more is to be asked for, or that is gone already */
static void u_fargone(void) {
  struct far far;
  size_t n;
  int fd[2], i, in[2], out[2];
  far_store("fargone");
  far_fill(&far, 1030 * 4096 - 100, 5);
  for (n = 0; n < 70000; n = n < 20000 ? n + 997 : n + 7001) {
    struct far_end end = {.left = n, .then = 2};
    int err = far_pull(&end, &far, "x", 5000);
    CHECK((err == -EPIPE || err == -ECONNRESET) && *far_why);
    far_unharmed();
  }
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
  close(fd[0]);
  CHECK(nbdserve_cas_pull(far_cas, "v@s", "x", FAR_PEER(fd[1], fd[1])) ==
        -EPIPE);
  close(fd[1]);
  signal(SIGPIPE, SIG_IGN); /* of pipes there is no other way */
  for (i = 0; i < 2; i++) {
    CHECK(pipe(in) == 0 && pipe(out) == 0);
    CHECK(write(in[1], "NBDMAGICIHAVEOPT\0\3", 18) == 18);
    close(i ? in[1] : out[0]);
    CHECK(nbdserve_cas_pull(far_cas, "v@s", "x", FAR_PEER(in[0], out[1])) ==
          -EPIPE);
    close(i ? out[0] : in[1]);
    close(in[0]);
    close(out[1]);
  }
  far_unharmed();
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* The id is of these nodes of a level, whatever is below. */
static void far_forge(struct far *far, int level, uint64_t i,
                      const unsigned char sum[32]) {
  memcpy(far_node(far, level, i), sum, 32);
  far_raise(far, level);
}

/* A tree that fits its id but is not as seal makes it is refused: its id would
 * not be that of the contents. */
static void u_farforged(void) {
  static unsigned char zeroes[1016 * 32];
  unsigned char sum[32];
  struct far good, far;
  int i, err;
  far_store("farforged");
  far_fill(&good, 1030 * 4096 - 100, 6);
  for (i = 0; i < 8; i++) {
    struct far_end end = {0};
    far_fill(&far, 1030 * 4096 - 100, 6);
    far_sum(zeroes, i ? sizeof zeroes : 4096, sum);
    if (i == 0) far_forge(&far, 0, 2, sum); /* a block that is zero */
    if (i == 1) memset(far_block(&far, 1016), 0, 14 * 4096);
    if (i == 1) memset(far_node(&far, 0, 1016), 0, 14 * 32);
    if (i == 1) far_forge(&far, 1, 1, sum); /* a leaf of zeroes */
    if (i >= 2 && i <= 4) { /* a node of zero nodes, with nothing else */
      memset(far.b, 0, (size_t)far.end);
      far_forge(&far, i - 1, 0, sum);
    }
    if (i == 5) { /* the digest is of nothing that is there */
      memset(sum, 7, 32);
      far_forge(&far, 0, 0, sum);
    }
    if (i == 6) { /* a digest of a block that is not there, behind a hole */
      memset(sum, 7, 32);
      far_forge(&far, 0, 1029, sum);
    }
    if (i == 7) { /* a digest that is zero, of a block that is not: a hole */
      far_forge(&far, 0, 0, zeroes);
    }
    CHECK(strcmp(far.id, good.id));
    err = far_pull(&end, &far, far.id, 20000);
    if (i < 7) {
      if (err != -EBADMSG) fprintf(stderr, "%d: %d\n", i, err);
      CHECK(err == -EBADMSG && *far_why);
      far_unharmed();
      /* What came of it can be removed. */
      CHECK(far_partial(&far) < 0 || nbdserve_cas_rm(far_cas, far.part) == 0);
    } else {
      char id[72];
      CHECK(err == 0); /* it is another snapshot, with its right id */
      memset(far_block(&far, 0), 0, 4096);
      far_seal(&far);
      CHECK(nbdserve_cas_seal(far_cas, "v@s", id, NULL, NULL) == 0);
      CHECK(!strcmp(id, far.id));
      CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
      CHECK(nbdserve_cas_rm(far_cas, "v") == 0);
    }
    far_free(&far);
    far_honest(&good);
  }
  far_free(&good);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* So is one whose last block has something behind the end, of which its digest
 * and the id are: that is not the id of these contents.  Nor does it count that
 * the block is here already, from a volume that is longer. */
static void u_fartail(void) {
  struct far good, far, longer;
  int i;
  far_store("fartail");
  far_fill(&good, 1030 * 4096 - 100, 6);
  for (i = 0; i < 2; i++) {
    struct far_end end = {0};
    far_fill(&far, 1030 * 4096 - 100, 6);
    far_block(&far, 1029)[4000] = 1;
    far_seal(&far);
    if (i) {
      CHECK(nbdserve_cas_create(far_cas, "longer", 4096) == 0);
      q_put(far_cas, "longer", 0, 4096, 'x');
      memset(far_block(&far, 1029), 'x', 4096);
      far_seal(&far);
    }
    CHECK(strcmp(far.id, good.id));
    CHECK(far_pull(&end, &far, far.id, 20000) == -EBADMSG && *far_why);
    far_unharmed();
    far_free(&far);
    far_honest(&good);
  }
  far_fill(&longer, 1030 * 4096, 6); /* there it belongs to the contents */
  memset(far_block(&longer, 1029), 'x', 4096);
  far_seal(&longer);
  far_honest(&longer);
  far_free(&longer);
  far_free(&good);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* An export that is too small to have a head is told of, too. */
/* A size of 0 has no tree by which its id could be tested. */
static void u_farempty(void) {
  struct far far;
  int is_zero, i;
  far_store("farempty");
  far_fill(&far, 5 * 4096, 17);
  for (is_zero = 0; is_zero < 2; is_zero++) { /* its id, or one of zeroes */
    struct far_lie lies[8] = {
        {FAR_OPTION, 0, 22, 8, cas_pull_layout(4096, 0).end},
        {FAR_ANSWER, 0, 32, 8, 0}};
    struct far_end end = {.t = {.lies = lies}};
    for (i = 0; i < 4 * is_zero; i++)
      lies[2 + i] = (struct far_lie){FAR_ANSWER, 0, 40 + 8 * (size_t)i, 8, 0};
    CHECK(far_pull(&end, &far, is_zero ? "x" : far.id, 5000) == -EBADMSG);
    far_unharmed();
  }
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

static void u_farsmall(void) {
  static const uint64_t sizes[] = {1, 4095};
  struct far far;
  int i;
  far_store("farsmall");
  far_fill(&far, 5 * 4096, 13);
  for (i = 0; i < 2; i++) {
    struct far_lie lies[2] = {{FAR_OPTION, 0, 22, 8, sizes[i]}};
    struct far_end end = {.t = {.lies = lies}};
    CHECK(far_pull(&end, &far, "x", 5000) == -EPROTO && *far_why);
    far_unharmed();
  }
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* Sizes around those of blocks and leaves, and none at all */
static void u_farsizes(void) {
  static const uint64_t sizes[] = {1,
                                   4095,
                                   4096,
                                   4097,
                                   1016 * 4096,
                                   1016 * 4096 + 1,
                                   1016 * 4096 - 1,
                                   2032 * 4096 + 5};
  struct nbdserve_export e = {0};
  struct far far;
  int i;
  far_store("farsizes");
  for (i = 0; i < COUNT(sizes); i++) {
    far_fill(&far, sizes[i], 7);
    far_honest(&far);
    far_free(&far);
  }
  far_make(&far, 4096, 1016, UINT64_C(3000) * 4096); /* all zero */
  far_seal(&far);
  far_honest(&far);
  far_free(&far);
  far_make(&far, 4096, 1016, 0);
  far_seal(&far);
  far_honest(&far);
  far_free(&far);
  CHECK(nbdserve_cas_volume(far_cas, "v", &e) == -ENOENT);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

struct far_other { /* a pull in another thread */
  struct far_end end;
  const struct far *far;
  int err;
};

static void *far_pulls(void *arg) {
  struct far_other *o = arg;
  struct nbdserve_peer peer = {.stall_ms = 20000};
  peer.in_fd = peer.out_fd = far_start(&o->end, o->far);
  o->err = nbdserve_cas_pull(far_cas, "v@s", "x", &peer);
  far_stop(&o->end, peer.in_fd);
  return NULL;
}

/* What is pulled as that was made, or gone on with, so many seconds ago */
static void far_age(const struct far *far, uint64_t seconds) {
  uint32_t i;
  os_lock(&far_cas->lock);
  for (i = 0; i < far_cas->nvolumes; i++)
    if (!strcmp(far_cas->volumes[i]->now.name, far->part))
      far_cas->volumes[i]->now.created = (uint64_t)time(NULL) - seconds;
  os_unlock(&far_cas->lock);
}

/* While a pull waits for its peer nobody else pulls that, nor removes what has
 * come, however old it looks; all else goes on.  Afterwards it can be removed,
 * and gc removes it after a week, but not others. */
static void u_farbusy(void) {
  const uint64_t week = 7 * 86400;
  struct far_other o = {.end = {.left = 30000, .then = 1}};
  struct far_end again = {.fd = 0}, part = {.left = 30000};
  struct nbdserve_export e = {0};
  struct far far, other;
  uint64_t bytes;
  pthread_t thread;
  int i;
  far_store("farbusy");
  far_fill(&far, 1030 * 4096 - 100, 14);
  far_fill(&other, 1030 * 4096 - 100, 15);
  CHECK(far_pull(&part, &other, "x", 5000) == -EPIPE);
  o.far = &far;
  CHECK(pthread_create(&thread, NULL, far_pulls, &o) == 0);
  for (i = 0; i < 1000 && far_partial(&far) < 0; i++)
    t_sleep(10);
  CHECK(i < 1000);
  t_sleep(100);
  CHECK(far_cas->super.ro_compat == CAS_HAS_PARTIAL);
  CHECK(far_pull(&again, &far, "x", 5000) == -EBUSY);
  CHECK(nbdserve_cas_rm(far_cas, far.part) == -EBUSY);
  CHECK(nbdserve_cas_rename(far_cas, far.part, "w") == -ENOENT);
  CHECK(nbdserve_cas_clone(far_cas, far.part, "w") == -ENOENT);
  CHECK(nbdserve_cas_resize(far_cas, far.part, 5) == -ENOENT);
  CHECK(nbdserve_cas_volume(far_cas, far.part, &e) == -ENOENT);
  far_age(&far, week + 60);
  far_age(&other, week - 60);
  CHECK(nbdserve_cas_gc(far_cas, &bytes, NULL, NULL) == 0);
  CHECK(far_partial(&far) >= 0 && far_partial(&other) >= 0);
  CHECK(nbdserve_cas_create(far_cas, "else", 8192) == 0);
  q_put(far_cas, "else", 0, 4096, 'e');
  CHECK(nbdserve_cas_snapshot(far_cas, "else@s") == 0);
  /* Who has made a snapshot of that name meanwhile keeps it. */
  CHECK(nbdserve_cas_clone(far_cas, "else", "v") == 0);
  CHECK(nbdserve_cas_snapshot(far_cas, "v@s") == 0);
  shutdown(o.end.fd, SHUT_RDWR);
  pthread_join(thread, NULL);
  CHECK(o.err == -EPIPE);
  CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
  CHECK(nbdserve_cas_rm(far_cas, "v") == 0);
  CHECK(nbdserve_cas_gc(far_cas, &bytes, NULL, NULL) == 0);
  CHECK(far_partial(&far) == -1 && far_partial(&other) >= 0);
  CHECK(nbdserve_cas_rm(far_cas, other.part) == 0);
  CHECK(far_partial(&other) == -1);
  CHECK(far_cas->super.ro_compat == 0); /* versions before may write again */
  far_honest(&far);
  far_unharmed();
  far_free(&far);
  far_free(&other);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* Names that cannot be, and a store that is not written, before the peer is
 * asked anything */
static void u_farnames(void) {
  static const char *const names[] = {"v", "v@", "@s",    "v@a/b",    "v@s@t",
                                      "",  "@",  "a/b@s", "sha256-@s"};
  struct far far;
  char path[500], *name = calloc(1, 5000);
  int i;
  far_fill(&far, 5 * 4096, 8);
  far_cas = q_new(path, "farnames", 0);
  for (i = 0; i < COUNT(names); i++) {
    struct far_end end = {0};
    int fd = far_start(&end, &far), err;
    err = nbdserve_cas_pull(far_cas, names[i], "x", FAR_PEER(fd, fd));
    if (err != -EINVAL) fprintf(stderr, "'%s': %d\n", names[i], err);
    CHECK(err == -EINVAL);
    far_stop(&end, fd);
    CHECK(far_partial(&far) < 0 || !nbdserve_cas_rm(far_cas, far.part));
  }
  memset(name, 'n', 4999);
  for (i = 4085; i < 4100; i++) {
    struct far_end end = {0};
    int fd = far_start(&end, &far), err;
    name[i] = 0;
    err = nbdserve_cas_pull(far_cas, "v@s", name, FAR_PEER(fd, fd));
    CHECK(err == (i + 5 > 4096 ? -ENAMETOOLONG : 0));
    far_stop(&end, fd);
    if (!err) CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
    name[i] = 'n';
  }
  CHECK(nbdserve_cas_close(far_cas) == 0);
  far_cas = q_open(path, NBDSERVE_CAS_READONLY);
  CHECK(nbdserve_cas_pull(far_cas, "w@s", "x", FAR_PEER(-1, -1)) == -EROFS);
  CHECK(nbdserve_cas_repair(far_cas, FAR_PEER(-1, -1), NULL, NULL, NULL) ==
        -EROFS);
  CHECK(nbdserve_cas_close(far_cas) == 0);
  free(name);
  far_free(&far);
}

/* ---- Repair from a peer that lies */

/* As far_fill, but no block is zero. */
static void far_full(struct far *far, uint64_t size, unsigned seed) {
  uint64_t i;
  far_fill(far, size, seed);
  for (i = 0; i < far->blocks; i++)
    far_put(far_block(far, i), 8, seed * 100000u + i);
  far_seal(far);
}

/* A store with the blocks of a snapshot, of which every third is damaged; how
 * many */
static int far_damaged(char path[500], const char *name,
                       const struct far *far) {
  struct nbdserve_export e = {0};
  unsigned char b[4096];
  uint64_t i;
  off_t at;
  int n = 0, fd;
  far_cas = q_new(path, name, 0);
  CHECK(nbdserve_cas_create(far_cas, "v", far->size) == 0);
  CHECK(nbdserve_cas_volume(far_cas, "v", &e) == 0);
  CHECK(e.ops->write(e.ctx, far->b + far->data, 0, far->size, 0) == 0);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_close(far_cas) == 0);
  CHECK((fd = open(path, O_RDWR)) >= 0);
  for (at = 0; pread(fd, b, 4096, at) == 4096; at += 4096)
    for (i = 0; i < far->blocks; i++)
      if (!far_is_zero(b, 4096) && !memcmp(b, far_block(far, i), 4096) &&
          i % 3 == 0) {
        b[n % 4096] ^= 1;
        CHECK(pwrite(fd, b, 4096, at) == 4096);
        n++;
        break;
      }
  close(fd);
  far_cas = q_open(path, NBDSERVE_CAS_VERIFY);
  return n;
}

static int far_repair(struct far_end *end, const struct far *far, int ms,
                      int *told) {
  struct nbdserve_peer peer = {.stall_ms = (uint32_t)ms};
  int err;
  *told = 0;
  peer.in_fd = peer.out_fd = far_start(end, far);
  err = nbdserve_cas_repair(far_cas, &peer, far_damage, NULL, told);
  far_stop(end, peer.in_fd);
  strcpy(far_why, peer.why);
  return err;
}

/* Repair writes only what fits the digest, whatever the peer says; an honest
 * one then mends all. */
static void u_farrepair(void) {
  static const struct {
    struct far_lie lie;
    int err; /* 0: what is left is damaged, -EUCLEAN */
  } lies[] = {
      {{FAR_GREETING, 0, 0, 8, 0}, -EPROTO},
      {{FAR_OPTION, 0, 12, 4, 0x80000006}, -ENOENT},
      {{FAR_OPTION, 0, 22, 8, 16384}, -EPROTO},
      {{FAR_OPTION, 0, 22, 8, 1}, -EPROTO},
      {{FAR_ANSWER, 0, 16, 8, 0}, -EPROTO},
      {{FAR_ANSWER, 0, 28, 4, 8192}, -EINVAL},
      {{FAR_OPTION, 0, 22, 8, 0}, -EPROTO},
      {{FAR_ANSWER, 1, 4, 4, 1}, -EIO}, /* the box is not to be written */
      {{FAR_ANSWER, 1, 8, 8, 5}, -EPROTO},
      {{FAR_ANSWER, 2, 0, 4, 0x668e33ef}, -EPROTO},
      {{FAR_ANSWER, 2, 8, 8, 99}, -EPROTO},
      {{FAR_ANSWER, 3, 8, 8, 0}, -EPROTO},
      {{FAR_ANSWER, 2, 4, 4, 5}, 0},
      {{FAR_ANSWER, 3, 16, 8, 0}, 0},
      {{FAR_ANSWER, 4, 16 + 4095, 1, 0x99}, 0},
      {{FAR_ANSWER, 3, 16, 1, 0xee}, 0},
  };
  char path[500], name[20];
  struct far far, other;
  struct nbdserve_export e = {0};
  unsigned char *b;
  int i, told, n, err;
  far_full(&far, 60 * 4096, 9);
  far_full(&other, 60 * 4096, 10);
  b = malloc((size_t)far.size);
  CHECK(b != NULL);
  for (i = 0; i < COUNT(lies) + 2; i++) {
    struct far_lie all[2] = {lies[i % COUNT(lies)].lie};
    struct far_end end = {.t = {.lies = i < COUNT(lies) ? all : NULL}};
    struct far_end honest = {0};
    int want = i < COUNT(lies) ? lies[i].err : i == COUNT(lies) ? 0 : -EPIPE;
    snprintf(name, sizeof name, "farrepair%d", i);
    n = far_damaged(path, name, &far);
    CHECK(n > 5);
    if (i > COUNT(lies)) end.left = 12000; /* it ends in the midst of it */
    err = far_repair(&end, i == COUNT(lies) ? &other : &far, 20000, &told);
    if (err != (want ? want : -EUCLEAN))
      fprintf(stderr, "%d: %d '%s', %d told\n", i, err, far_why, told);
    CHECK(err == (want ? want : -EUCLEAN));
    CHECK(want ? *far_why && !told : told > 0);
    if (i == COUNT(lies)) CHECK(told >= n - 3);
    CHECK(nbdserve_cas_volume(far_cas, "v", &e) == 0);
    for (uint64_t k = 0; k < far.blocks; k++) {
      int bad = e.ops->read(e.ctx, b, k * 4096, 4096, 0);
      CHECK(bad == -EIO || (!bad && !memcmp(b, far_block(&far, k), 4096)));
    }
    CHECK(far_repair(&honest, &far, 20000, &told) == 0 && told == 0);
    CHECK(e.ops->read(e.ctx, b, 0, far.size, 0) == 0);
    CHECK(!memcmp(b, far.b + far.data, (size_t)far.size));
    e.ops->close(e.ctx);
    CHECK(nbdserve_cas_close(far_cas) == 0);
  }
  free(b);
  far_free(&far);
  far_free(&other);
}

/* ---- The serving side */

/* A snapshot v@s of this store with these contents, sealed */
static void far_import(const struct far *far) {
  struct nbdserve_export e = {0};
  char id[72];
  CHECK(nbdserve_cas_create(far_cas, "v", far->size) == 0);
  CHECK(nbdserve_cas_volume(far_cas, "v", &e) == 0);
  CHECK(e.ops->write(e.ctx, far->b + far->data, 0, far->size, 0) == 0);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_snapshot(far_cas, "v@s") == 0);
  CHECK(nbdserve_cas_volume(far_cas, "v@s/pull", &e) == -EOPNOTSUPP);
  CHECK(nbdserve_cas_seal(far_cas, "v@s", id, NULL, NULL) == 0);
  CHECK(!strcmp(id, far->id));
}

/* NAME/pull is what the format says, in one go and in pieces that begin and end
 * anywhere */
static void u_farserved(void) {
  struct nbdserve_export e = {0};
  struct far far;
  unsigned char *b;
  unsigned x = t_seed();
  uint64_t off, len, edge;
  int i, k;
  far_store("farserved");
  far_fill(&far, 1030 * 4096 - 100, 11);
  far_import(&far);
  CHECK(nbdserve_cas_volume(far_cas, "v/pull", &e) == -EOPNOTSUPP);
  CHECK(nbdserve_cas_volume(far_cas, "w@s/pull", &e) == -ENOENT);
  CHECK(nbdserve_cas_volume(far_cas, "/pull", &e) == -ENOENT);
  CHECK(nbdserve_cas_volume(far_cas, "v@s/pull/pull", &e) == -ENOENT);
  CHECK(nbdserve_cas_volume(far_cas, "v@s/pull", &e) == 0);
  CHECK(e.size == far.end && e.flags & NBDSERVE_EXPORT_READONLY);
  CHECK((b = malloc((size_t)far.end)) != NULL);
  CHECK(e.ops->read(e.ctx, b, 0, far.end, 0) == 0);
  CHECK(!memcmp(b, far.b, (size_t)far.end));
  for (i = 0; i < 7; i++)
    for (k = -40; k <= 40; k++) {
      edge = i < 4 ? far.at[i] : i == 4 ? far.data : i == 5 ? far.end : 0;
      if (i == 6) edge = far.at[0] + 1016 * 32; /* two leaves meet */
      if (k < 0 && edge < 40) continue;
      off = edge + (uint64_t)(int64_t)k;
      if (off >= far.end) continue;
      for (len = 1; len < 9000 && off + len <= far.end; len = 3 * len + 1) {
        memset(b, 0x5a, len);
        CHECK(e.ops->read(e.ctx, b, off, len, 0) == 0);
        CHECK(!memcmp(b, far.b + off, len));
      }
    }
  for (i = 0; i < 2000; i++) {
    x = x * 1664525 + 1013904223;
    off = (x >> 3) % (i % 2 ? far.end : far.data / 16);
    x = x * 1664525 + 1013904223;
    len = 1 + (x >> 8) % 70000;
    if (len > far.end - off) len = far.end - off;
    CHECK(e.ops->read(e.ctx, b, off, len, 0) == 0);
    CHECK(!memcmp(b, far.b + off, len));
  }
  CHECK(nbdserve_cas_rm(far_cas, "v@s") == -EBUSY);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_rm(far_cas, "v@s") == 0);
  free(b);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}

/* Clients of /blocks that write garbage, read between blocks and beyond the
 * end, and do what is for volumes: an error, and the next one is served. */
static void u_farbox(void) {
  const uint32_t front = 12288, all = front + 256 * 4096;
  struct nbdserve_config config = {.version = NBDSERVE_VERSION_NUMBER};
  static unsigned char b[257 * 4096];
  struct nbdserve *s;
  struct far far;
  struct served v[2] = {{0}, {0}};
  struct t_conn c[2];
  uint32_t x = t_seed(), i, off, len;
  far_store("farbox");
  far_fill(&far, 60 * 4096, 12);
  far_import(&far);
  config.find = q_find;
  config.ctx = far_cas;
  CHECK(nbdserve_new(&s, &config) == 0);
  for (i = 0; i < 2; i++) {
    s_start(v + i, s, c + i);
    CHECK(t_open(c + i, c[i].fd, "/blocks", (int)i) == 0 && c[i].size == all);
  }
  for (i = 0; i < 600; i++) {
    struct t_conn *one = c + i % 2;
    int err;
    x = x * 1664525 + 1013904223;
    off = (x >> 4) % all;
    x = x * 1664525 + 1013904223;
    len = 1 + (x >> 8) % (i % 3 ? 9000 : 500000);
    if (i % 5 == 0) off = off / 4096 * 4096;
    if (len > all - off) len = all - off;
    if (i % 3) {
      err = t_do(one, 0, READ, off, len, b);
      if (off < front) /* what is behind that begins with a block */
        CHECK(err == (off + len <= front           ? 0
                      : (off + len - front) % 4096 ? 22
                                                   : 5));
      else
        CHECK(err == ((off - front) % 4096 || len % 4096 ? 22 : 5));
    } else {
      memset(b, (int)(x >> 24) | 1, len);
      err = t_do(one, 0, WRITE, off, len, b);
      CHECK(err == (off < 4096 || off + len > front ? 22 : 0));
    }
  }
  for (i = 0; i < 2; i++) { /* what is beyond */
    CHECK(t_do(c + i, 0, READ, all, 4096, b) == 22);
    CHECK(t_do(c + i, 0, READ, all - 4096, 8192, b) == 22);
    CHECK(t_do(c + i, 0, READ, UINT64_MAX - 4095, 4096, b) == 22);
    CHECK(t_do(c + i, 0, WRITE, UINT64_MAX - 31, 32, b) != 0);
    CHECK(t_do(c + i, 0, WRITE, front - 1, 2, b) == 22);
    CHECK(t_do(c + i, 0, FLUSH, 0, 0, NULL) >= 0);
    CHECK(t_do(c + i, 0, TRIM, 8192, 4096, NULL) != 0);
    CHECK(t_do(c + i, 0, ZEROES, front, 4096, NULL) != 0);
  }
  /* Each has a box of its own, and gets what is there. */
  memset(b, 0, 8192);
  CHECK(t_do(c, 0, WRITE, 4096, 8192, b) == 0);
  CHECK(t_do(c, 0, WRITE, 4096 + 32 * 255, 32, far_node(&far, 0, 1)) == 0);
  CHECK(t_do(c + 1, 0, WRITE, 4096, 64, far_node(&far, 0, 0)) == 0);
  CHECK(t_do(c, 0, READ, front + 255 * 4096, 4096, b) == 0);
  CHECK(!memcmp(b, far_block(&far, 1), 4096));
  CHECK(t_do(c, 0, READ, front + 254 * 4096, 8192, b) == 5); /* and nothing */
  CHECK(t_do(c, 0, READ, front, 4096, b) == 5);
  CHECK(t_do(c + 1, 0, READ, front, 8192, b) == 0);
  CHECK(!memcmp(b, far_block(&far, 0), 8192));
  for (i = 0; i < 2; i++) {
    t_close(c + i);
    CHECK(s_end(v + i) == 0);
  }
  nbdserve_free(s);
  CHECK(nbdserve_cas_verify(far_cas, far_damage, NULL, &i) == 0);
  far_free(&far);
  CHECK(nbdserve_cas_close(far_cas) == 0);
}
#else
static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  memset(sum, p && n ? 1 : 0, 32);
}
static void u_farlies(void) {}
static void u_farodd(void) {}
static void u_farnarrow(void) {}
static void u_farstall(void) {}
static void u_farcut(void) {}
static void u_fargone(void) {}
static void u_farforged(void) {}
static void u_fartail(void) {}
static void u_farempty(void) {}
static void u_farsmall(void) {}
static void u_farsizes(void) {}
static void u_farbusy(void) {}
static void u_farnames(void) {}
static void u_farrepair(void) {}
static void u_farserved(void) {}
static void u_farbox(void) {}
#endif

static const struct {
  const char *name;
  void (*run)(void);
} verbs[] = {
    {"arguments", u_arguments},
    {"uris", u_uris},
    {"parallel", u_parallel},
    {"serial", u_serial},
    {"slow", u_slow},
    {"leave", u_leave},
    {"nagle", u_nagle},
    {"vanish", u_vanish},
    {"inflight", u_inflight},
    {"memory", u_memory},
    {"requests", u_requests},
    {"fua", u_fua},
    {"errors", u_errors},
    {"slowbefore", u_slow_before},
    {"hangup", u_hangup},
    {"dependent", u_dependent},
    {"missing", u_missing},
    {"flush", u_flush},
    {"find", u_find},
    {"extents", u_extents},
    {"resize", u_resize},
    {"sizes", u_sizes},
    {"before", u_before},
    {"without", u_without},
    {"temporary", u_temporary},
    {"overerror", u_overerror},
    {"deadline", u_deadline},
    {"stalls", u_stalls},
    {"sipworker", u_sipworker},
    {"direct", u_direct},
    {"stop", u_stop},
    {"two", u_two},
    {"failed", u_failed},
    {"flags", u_flags},
    {"null", u_null},
    {"totals", u_totals},
    {"free", u_free},
    {"fips", u_fips},
    {"ways", u_ways},
    {"together", u_together},
    {"ids", u_ids},
    {"slots", u_slots},
    {"cache", u_cache},
    {"hand", u_hand},
    {"seal", u_seal},
    {"rotten", u_rotten},
    {"diff", u_diff},
    {"maplen", u_maplen},
    {"slice", u_slice},
    {"joined", u_joined},
    {"listed", u_listed},
    {"deaf", u_deaf},
    {"cut", u_cut},
    {"lies", u_lies},
    {"liestold", u_liestold},
    {"listfails", u_listfails},
    {"poked", u_poked},
    {"signals", u_signals},
    {"mixed", u_mixed},
    {"pipelined", u_pipelined},
    {"total", u_total},
    {"unread", u_unread},
    {"linger", u_linger},
    {"counted", u_counted},
    {"lastflush", u_lastflush},
    {"unflushed", u_unflushed},
    {"turns", u_turns},
    {"once", u_once},
    {"adding", u_adding},
    {"gather", u_gather},
    {"fuazero", u_fuazero},
    {"serialmix", u_serialmix},
    {"givenback", u_givenback},
    {"contexts", u_contexts},
    {"manycontexts", u_manycontexts},
    {"manyextents", u_manyextents},
    {"resizedset", u_resizedset},
    {"onethread", u_onethread},
    {"changes", u_changes},
    {"lostchanges", u_lostchanges},
    {"fullhands", u_fullhands},
    {"silent", u_silent},
    {"flooded", u_flooded},
    {"sendfails", u_sendfails},
    {"closed", u_closed},
    {"info", u_info},
    {"sametime", u_sametime},
    {"oneflush", u_oneflush},
    {"farlies", u_farlies},
    {"farodd", u_farodd},
    {"farnarrow", u_farnarrow},
    {"farstall", u_farstall},
    {"farcut", u_farcut},
    {"fargone", u_fargone},
    {"farforged", u_farforged},
    {"fartail", u_fartail},
    {"farempty", u_farempty},
    {"farsmall", u_farsmall},
    {"farsizes", u_farsizes},
    {"farbusy", u_farbusy},
    {"farnames", u_farnames},
    {"farrepair", u_farrepair},
    {"farserved", u_farserved},
    {"farbox", u_farbox},
};

int main(int argc, char **argv) {
  int i;
  CHECK(argc == 3);
  alarm(30);
  dir = argv[2];
  for (i = 0; i < COUNT(verbs); i++)
    if (!strcmp(argv[1], verbs[i].name)) {
      verbs[i].run();
      CHECK(m_left() == 0); /* the host has freed all, and so did we */
      return 0;
    }
  return 2;
}

//== fault
/* Defends "disk full", "write or fsync error" and "a shrinking file" for files:
 * the client gets the error, and no later flush claims success.
 *
 * fault VERB FILE, with system calls that fail as they are told: err for the
 * next times calls (-1: all) behind the next skip, at most cut bytes at a time,
 * EINTR before every other call, EIO for what covers the file's byte bad, which
 * is good after that if once is set, or the byte also; if heals is set, a write
 * of all the 4096 bytes around bad makes it good; a call waits for the end of
 * hold, of reads those of byte 0 and those of one thread (fi_slow). */
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

enum {
  PREAD,
  PWRITE,
  SYNC,
  FALLOCATE,
  THREAD,
  MALLOC,
  BIND6, /* bind() to an IPv6 address */
  NCALLS
};
static struct {
  int calls, err, times, skip, eintr;
  int hold; /* (t_hold) */
  size_t cut;
  off_t bad, also;
  int once, heals;
} fi[NCALLS];
static pthread_mutex_t fi_lock = PTHREAD_MUTEX_INITIALIZER;

static int fi_covers(off_t off, size_t len, off_t byte) {
  return byte && off <= byte && off + (off_t)len > byte;
}

/* How often a call was made; from now on it counts from 0 if `resets` */
static int fi_calls(int f, int resets) {
  pthread_mutex_lock(&fi_lock);
  int n = fi[f].calls;
  if (resets) fi[f].calls = 0;
  pthread_mutex_unlock(&fi_lock);
  return n;
}

/* The thread of which all reads wait for the end of hold, if there is one */
static pthread_t fi_slow;
static int fi_is_slow;

/* Does a call wait while that kind of calls is on hold? */
static int fi_waits(int f, off_t off) {
  int waits;
  pthread_mutex_lock(&fi_lock);
  waits = fi_is_slow && pthread_equal(fi_slow, pthread_self());
  pthread_mutex_unlock(&fi_lock);
  return waits || f != PREAD || !off;
}

static int fi_fails(int f, off_t off, size_t *len) {
  int err = 0;
  while (t_hold(&fi[f].hold, -1) && fi_waits(f, off))
    usleep(1000);
  pthread_mutex_lock(&fi_lock);
  fi[f].calls++;
  if (f == MALLOC && fi[f].calls == fi[f].bad) err = ENOMEM;
  if (fi[f].skip > 0)
    fi[f].skip--;
  else if (fi[f].times) {
    err = fi[f].err;
    if (fi[f].times > 0) fi[f].times--;
  }
  if (fi[f].eintr && fi[f].calls % 2) err = EINTR;
  if (fi[f].cut && *len > fi[f].cut) *len = fi[f].cut;
  if (fi[f].heals && fi_covers(off, *len, fi[f].bad / 4096 * 4096) &&
      fi_covers(off, *len, fi[f].bad | 4095))
    fi[PREAD].bad = fi[f].bad = 0;
  if (fi_covers(off, *len, fi[f].bad)) {
    err = EIO;
    if (fi[f].once) fi[f].bad = 0;
  }
  if (fi_covers(off, *len, fi[f].also)) err = EIO;
  pthread_mutex_unlock(&fi_lock);
  errno = err;
  return err;
}

static ssize_t fi_pread(int fd, void *b, size_t n, off_t off) {
  return fi_fails(PREAD, off, &n) ? -1 : pread(fd, b, n, off);
}

/* In which order blocks of 4096 bytes were written and syncs began */
static int fi_clock, fi_written_at[16], fi_synced_at;

static int fi_tick(void) {
  int now;
  pthread_mutex_lock(&fi_lock);
  now = ++fi_clock;
  pthread_mutex_unlock(&fi_lock);
  return now;
}

static ssize_t fi_written(off_t off, ssize_t n) {
  off_t i;
  for (i = off / 4096; i < 16 && i * 4096 < off + n; i++)
    fi_written_at[i] = fi_tick();
  return n;
}

static ssize_t fi_pwrite(int fd, const void *b, size_t n, off_t off) {
  if (fi_fails(PWRITE, off, &n)) return -1;
  return fi_written(off, pwrite(fd, b, n, off));
}

static size_t fi_sum(const struct iovec *v, int n) {
  size_t sum = 0;
  while (n-- > 0)
    sum += v++->iov_len;
  return sum;
}

static ssize_t fi_preadv(int fd, const struct iovec *v, int n, off_t off) {
  size_t len = fi_sum(v, n), all = len;
  if (fi_fails(PREAD, off, &len)) return -1;
  if (len == all) return preadv(fd, v, n, off);
  return pread(fd, v->iov_base, len < v->iov_len ? len : v->iov_len, off);
}

static off_t fi_away, fi_away_end; /* what else is not in memory */
static off_t fi_also_away;         /* a byte of which that is so, too, or 0 */

static int fi_yields; /* who waits for a lock gets it when it is let go */

static int fi_unlock(pthread_mutex_t *lock) {
  int err = pthread_mutex_unlock(lock);
  if (t_hold(&fi_yields, -1)) usleep(2000);
  return err;
}

/* preadv2(RWF_NOWAIT): while reads are on hold, byte 0 is not in memory. */
static long fi_syscall(long number, int fd, const struct iovec *v, int n,
                       long off, long high, int flags) {
  size_t len = fi_sum(v, n);
  if (!off && t_hold(&fi[PREAD].hold, -1)) return errno = EAGAIN, -1;
  if (off >= fi_away && off < fi_away_end) return errno = EAGAIN, -1;
  if (fi_covers(off, len, fi_also_away)) return errno = EAGAIN, -1;
  if (fi_fails(PREAD, off, &len)) return -1;
  return syscall(number, fd, v, n, off, high, flags);
}

static ssize_t fi_pwritev(int fd, const struct iovec *v, int n, off_t off) {
  size_t len = fi_sum(v, n), all = len;
  if (fi_fails(PWRITE, off, &len)) return -1;
  if (len == all) return fi_written(off, pwritev(fd, v, n, off));
  if (len > v->iov_len) len = v->iov_len;
  return fi_written(off, pwrite(fd, v->iov_base, len, off));
}

/* A file that must have been synced when the process exits with status 0 */
static const char *fi_must_sync;
static useconds_t fi_sync_us; /* that a sync takes, besides */
static int fi_no_disk; /* syncs do nothing: much is synced, and no power cut */

static int fi_fdatasync(int fd) {
  struct stat synced, wanted;
  size_t n = 0;
  fi_synced_at = fi_tick();
  if (fi_must_sync && stat(fi_must_sync, &wanted) == 0 &&
      fstat(fd, &synced) == 0 && synced.st_ino == wanted.st_ino)
    fi_must_sync = NULL;
  if (fi_fails(SYNC, 0, &n)) return -1;
  if (fi_sync_us) usleep(fi_sync_us);
  return fi_no_disk ? 0 : fdatasync(fd);
}

static int fi_fallocate(int fd, int mode, off_t off, off_t len) {
  size_t n = (size_t)len;
  return fi_fails(FALLOCATE, off, &n) ? -1 : fallocate(fd, mode, off, len);
}

static int fi_advised; /* ranges that were asked for */

static int fi_fadvise(int fd, off_t off, off_t len, int advice) {
  pthread_mutex_lock(&fi_lock);
  if (advice == POSIX_FADV_WILLNEED) fi_advised++;
  pthread_mutex_unlock(&fi_lock);
  return posix_fadvise(fd, off, len, advice);
}

static int fi_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *),
                     void *arg) {
  size_t n = 0;
  int err = fi_fails(THREAD, 0, &n);
  return err ? err : pthread_create(t, a, f, arg);
}

static int fi_listen(int fd, int backlog) {
  usleep(30000); /* in between the socket looks like a leftover */
  return listen(fd, backlog);
}

static int fi_bind(int fd, const struct sockaddr *a, socklen_t len) {
  size_t n = 0;
  if (a->sa_family == AF_INET6 && fi_fails(BIND6, 0, &n)) return -1;
  return bind(fd, a, len);
}

/* What was set last, on any socket */
static int fi_keepalive, fi_keepidle, fi_keepintvl, fi_keepcnt;

static int fi_setsockopt(int fd, int level, int name, const void *value,
                         socklen_t len) {
  int v = 0;
  if (len == sizeof v) memcpy(&v, value, sizeof v);
  if (level == SOL_SOCKET && name == SO_KEEPALIVE) fi_keepalive = v;
#ifdef TCP_KEEPIDLE
  if (level == IPPROTO_TCP && name == TCP_KEEPIDLE) fi_keepidle = v;
  if (level == IPPROTO_TCP && name == TCP_KEEPINTVL) fi_keepintvl = v;
  if (level == IPPROTO_TCP && name == TCP_KEEPCNT) fi_keepcnt = v;
#endif
  return setsockopt(fd, level, name, value, len);
}

static long fi_blocks; /* that the library has allocated */

static void fi_count(long more) {
  pthread_mutex_lock(&fi_lock);
  fi_blocks += more;
  pthread_mutex_unlock(&fi_lock);
}

static void *fi_malloc(size_t n) {
  size_t unused = 0;
  void *p = fi_fails(MALLOC, 1 << 30, &unused) ? NULL : malloc(n);
  if (p) fi_count(1);
  return p;
}

/* memset, of which a compiler does not know that it is in vain before free */
static void *(*volatile fi_set)(void *, int, size_t) = memset;

/* Who still uses what is free finds other contents. */
static void fi_free(void *p) {
  if (p) fi_count(-1);
  if (p) fi_set(p, 0x5a, malloc_usable_size(p));
  free(p);
}

#include <sys/ioctl.h>

/* Other calls that do as they are told: fstat says that files are block
 * devices, of which BLKROGET says that they are read-only; open fails with this
 * errno for files without a name; calls and last result of mkstemp */
static int fi_device, fi_readonly, fi_tmpfile, fi_named, fi_named_fd;

static int fi_ioctl(int fd, unsigned long what, void *arg) {
  if (what != _IO(0x12, 94)) return ioctl(fd, what, arg);
  *(int *)arg = fi_readonly;
  return 0;
}

static int fi_fstat(int fd, struct stat *st) {
  int r = fstat(fd, st);
  if (fi_device) st->st_mode = S_IFBLK | 0600;
  return r;
}

static int fi_open(const char *name, int flags, ...) {
#ifdef O_TMPFILE
  if ((flags & O_TMPFILE) == O_TMPFILE && fi_tmpfile)
    return errno = fi_tmpfile, -1;
#endif
  return open(name, flags, 0600);
}

static int fi_mkstemp(char *name) {
  fi_named++;
  return fi_named_fd = mkstemp(name);
}

#undef pread
#undef pwrite
#undef preadv
#undef pwritev
#undef fallocate
#define pread fi_pread
#define pwrite fi_pwrite
#define preadv fi_preadv
#define pwritev fi_pwritev
#define syscall fi_syscall
#define fdatasync fi_fdatasync
#define fallocate fi_fallocate
#define posix_fadvise fi_fadvise
#define pthread_create fi_create
#define pthread_mutex_unlock fi_unlock
#define listen fi_listen
#define bind fi_bind
#define setsockopt fi_setsockopt
#undef open
#undef fstat
#undef mkstemp
#define open fi_open
#define fstat fi_fstat
#define mkstemp fi_mkstemp
#define ioctl fi_ioctl
#define NBDSERVE_MALLOC fi_malloc
#define NBDSERVE_FREE fi_free
#undef NBDSERVE_NO_MAIN
#define main fault_main
#define NBDSERVE_NO_SANDBOX 1 /* which makes system calls by number, too */
int fault_main(int argc, char **argv);
#include "nbdserve.c"
#undef main

static const char *path;       /* of the image: 64 KiB */
static const char *error_name; /* argument of some */

static void i_open(struct one *o, int structured) {
  struct nbdserve_export e = {0};
  CHECK(nbdserve_flat_open(path, NULL, &e) == 0);
  o_open(o, &e, structured);
}

static void i_sync(void) {
  static char b[512];
  struct one o;
  struct served v = {0};
  struct t_conn c;
  int fua;
  for (fua = 0; fua < 2; fua++) { /* met by a flush, or by a FUA write */
    i_open(&o, fua);
    s_start(&v, o.s, &c);
    CHECK(t_open(&c, c.fd, "", 1) == 0);
    CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 0);
    fi[SYNC].err = EIO;
    fi[SYNC].times = 1;
    if (fua)
      CHECK(t_do(&o.c, FUA, WRITE, 0, 512, b) == 5);
    else
      CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 5);
    CHECK(fi[SYNC].times == 0);
    CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 5);
    CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 5);
    CHECK(t_do(&c, 0, FLUSH, 0, 0, NULL) == 5);
    CHECK(t_do(&c, 0, WRITE, 0, 512, b) == 5);
    CHECK(t_do(&c, FUA, WRITE, 0, 512, b) == 5);
    CHECK(t_do(&c, 0, ZEROES, 0, 512, NULL) == 5);
    CHECK(t_do(&c, 0, READ, 0, 512, b) == 0);
    t_close(&c);
    CHECK(s_end(&v) == 0);
    o_close(&o);
  }
  i_open(&o, 1); /* opened anew */
  CHECK(t_do(&o.c, FUA, WRITE, 0, 512, b) == 0);
  CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
  o_close(&o);
}

static void i_shrunk(void) {
  static char b[65536];
  struct one o;
  int structured;
  for (structured = 0; structured < 2; structured++) {
    i_open(&o, structured);
    CHECK(truncate(path, 4100) == 0);
    CHECK(t_do(&o.c, 0, READ, 8192, 512, b) == 5);
    CHECK(t_do(&o.c, 0, READ, 4096, 512, b) == 5);
    CHECK(t_do(&o.c, 0, READ, 0, 65536, b) == 5);
    CHECK(t_do(&o.c, 0, READ, 0, 4100, b) == 0);
    o_close(&o);
    CHECK(truncate(path, 65536) == 0);
  }
}

static void i_full(void) {
  static const int map[][2] = {{ENOSPC, 28}, {EDQUOT, 28}, {EFBIG, 28},
                               {EIO, 5},     {EROFS, 1},   {EPERM, 1}};
  char b[512] = "old";
  struct one o;
  int i;
  i_open(&o, 1);
  CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 0);
  for (i = 0; i < COUNT(map); i++) {
    fi[PWRITE].err = map[i][0];
    fi[PWRITE].times = -1;
    memset(b, 'n', sizeof b);
    CHECK(t_do(&o.c, i % 2 ? FUA : 0, WRITE, 0, 512, b) == map[i][1]);
    CHECK(t_do(&o.c, 0, READ, 0, 512, b) == 0 && !strcmp(b, "old"));
    CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
    fi[PWRITE].times = 0;
    CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 0);
  }
  o_close(&o);
}

/* 16 neighbours of 1000 bytes, sent at once; which have failed with EIO */
static unsigned i_neighbours(struct t_conn *c, int command, unsigned char *b) {
  static unsigned char all[16 * 1028];
  struct t_reply r = {0};
  size_t step = command == WRITE ? 1028 : 28;
  unsigned i, failed = 0, left = 16;
  for (i = 0; i < 16; i++) {
    t_head(all + step * i, 0, command, i, 1000u * i, 1000);
    if (command == WRITE) memcpy(all + step * i + 28, b + 1000u * i, 1000);
  }
  CHECK(t_write(c->fd, all, step * 16) == 0);
  while (left) {
    CHECK(t_recv(c, &r) && (!r.error || r.error == 5));
    i = r.cookie & 15;
    if (r.error)
      failed |= 1u << i;
    else if (command == READ)
      memcpy(b + 1000u * i, r.data, 1000);
    left -= (unsigned)r.done;
  }
  free(r.data);
  return failed;
}

static void i_short(void) {
  static unsigned char in[16000], out[16000];
  struct one o;
  int i, fd;
  for (i = 0; i < 16000; i++)
    in[i] = (unsigned char)(i * 7 + i / 256);
  i_open(&o, 0);
  for (i = 0; i < NCALLS - 2; i++) {
    fi[i].eintr = 1;
    if (i < 2) fi[i].cut = 37;
  }
  CHECK(i_neighbours(&o.c, WRITE, in) == 0);
  CHECK(i_neighbours(&o.c, READ, out) == 0 && !memcmp(in, out, 16000));
  CHECK(t_do(&o.c, FUA, WRITE, 100, 999, in + 100) == 0);
  CHECK(t_do(&o.c, 0, READ, 1, 15999, out) == 0);
  CHECK(!memcmp(in + 1, out, 15999));
  CHECK(t_do(&o.c, NO_HOLE, ZEROES, 20000, 4096, NULL) == 0);
  CHECK(t_do(&o.c, 0, TRIM, 30000, 9000, NULL) == 0);
  CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
  o_close(&o);
  CHECK((fd = open(path, O_RDONLY)) >= 0);
  CHECK(t_read(fd, out, 16000) == 16000 && !memcmp(in, out, 16000));
}

static void i_read(void) {
  static unsigned char in[16000], out[16000];
  struct one o;
  int structured, i;
  for (i = 0; i < 16000; i++)
    in[i] = (unsigned char)(i * 7 + i / 256);
  for (structured = 0; structured < 2; structured++) {
    i_open(&o, structured);
    CHECK(i_neighbours(&o.c, WRITE, in) == 0);
    fi[PREAD].bad = 5500;
    CHECK(t_do(&o.c, 0, READ, 5000, 1000, out) == 5);
    CHECK(t_do(&o.c, 0, READ, 0, 5500, out) == 0);
    memset(out, 0, sizeof out); /* the neighbours do not notice */
    CHECK(i_neighbours(&o.c, READ, out) == 1u << 5);
    CHECK(!memcmp(out, in, 5000) && !memcmp(out + 6000, in + 6000, 10000));
    fi[PREAD].bad = 0;
    CHECK(i_neighbours(&o.c, READ, out) == 0 && !memcmp(in, out, 16000));
    fi[PWRITE].bad = 3500;
    CHECK(i_neighbours(&o.c, WRITE, in) == 1u << 3);
    fi[PWRITE].bad = 0;
    o_close(&o);
  }
}

/* A write that is done in pieces fails as one, whichever of them does */
static void i_halfway(void) {
  enum {
    LONG = 4 << 20
  };
  unsigned char *in = t_alloc(LONG), *out = t_alloc(LONG);
  struct one o;
  int k;
  CHECK(truncate(path, LONG) == 0);
  for (k = 0; k < 16; k++) { /* piece, both kinds of replies, FUA */
    i_open(&o, k >> 2 & 1);
    memset(in, k + 1, LONG);
    fi[PWRITE].calls = 0;
    fi[PWRITE].skip = k & 3;
    fi[PWRITE].err = ENOSPC;
    fi[PWRITE].times = 1;
    CHECK(t_do(&o.c, k & 8 ? FUA : 0, WRITE, 0, LONG, in) == 28);
    CHECK(fi[PWRITE].times == 0 && fi[PWRITE].calls > (k & 3));
    CHECK(t_do(&o.c, 0, READ, 0, LONG, out) == 0);
    CHECK((k & 3) == 0 || !memcmp(in, out, (size_t)(k & 3) << 20));
    CHECK(t_do(&o.c, 0, WRITE, 0, LONG, in) == 0);
    CHECK(t_do(&o.c, 0, READ, 0, LONG, out) == 0 && !memcmp(in, out, LONG));
    o_close(&o);
  }
  CHECK(truncate(path, 65536) == 0);
}

/* Reads are answered while a flush or a trim is under way */
static void i_slow(void) {
  static const int slow[] = {TRIM, FLUSH, READ};
  static const int calls[] = {FALLOCATE, SYNC, PREAD};
  static char b[512];
  unsigned char all[4 * 28];
  struct one o;
  struct t_reply r = {0};
  int i, call, fd = open(path, O_RDONLY), tells = os_can_read_now(fd);
  close(fd);
  for (call = 0; call < 2 + tells; call++) {
    i_open(&o, 0);
    t_hold(&fi[calls[call]].hold, 1);
    for (i = 0; i < 4; i++)
      t_head(all + 28 * i, 0, i != 1 ? READ : slow[call], (uint32_t)i,
             i != 1 ? 512 : 0, 512);
    CHECK(t_write(o.c.fd, all, sizeof all) == 0);
    for (i = 0; i < 3; i++)
      CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie != 1);
    CHECK(t_do(&o.c, 0, WRITE, 0, 512, b) == 0);
    CHECK(t_do(&o.c, 0, READ, 1024, 512, b) == 0);
    t_hold(&fi[calls[call]].hold, 0);
    CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie == 1 && !r.error);
    o_close(&o);
  }
  i_open(&o, 0);
  for (i = 0; i < 2; i++) { /* one that comes alone: only the first time */
    t_hold(&fi[SYNC].hold, 1);
    t_head(all, 0, FLUSH, 1, 0, 0);
    t_head(all + 28, 0, READ, 2, 512, 512);
    CHECK(t_write(o.c.fd, all, 28) == 0);
    usleep(100000);
    CHECK(t_write(o.c.fd, all + 28, 28) == 0);
    if (i) CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie == 2 && !r.error);
    usleep(100000);
    t_hold(&fi[SYNC].hold, 0);
    CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie == 1 && !r.error);
    if (!i) CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie == 2 && !r.error);
  }
  o_close(&o);
  free(r.data);
}

/* What a server takes for the number of processors */
static void i_set_cpus(struct nbdserve *s, int n) {
  os_lock(&s->lock);
  s->cpus = n;
  os_unlock(&s->lock);
}

/* Of what has come together the first half is answered before the rest is done,
 * but not with one processor, nor if other clients are busy. */
static void i_half(void) {
  enum {
    N = 20
  };
  unsigned char all[(N + 1) * 28 + 512] = {0};
  struct one o;
  struct t_reply r = {0};
  for (int how = 0; how < 3; how++) {
    struct pollfd p = {.events = POLLIN};
    uint32_t i;
    i_open(&o, 0);
    p.fd = o.c.fd;
    i_set_cpus(o.s, how ? 2 : 1);
    os_lock(&o.s->lock);
    if (how == 2) o.s->rounds += 64; /* of others */
    os_unlock(&o.s->lock);
    for (i = 0; i < N; i++)
      t_head(all + 28 * i, 0, READ, i, 512, 512);
    t_head(all + 28 * N, 0, WRITE, N, 0, 512);
    t_hold(&fi[PWRITE].hold, 1);
    CHECK(t_write(o.c.fd, all, sizeof all) == 0);
    for (i = 0; i < N && how == 1; i++)
      CHECK(t_recv(&o.c, &r) && !r.error && (uint32_t)r.cookie < N);
    CHECK(poll(&p, 1, 100) == 0);
    t_hold(&fi[PWRITE].hold, 0);
    for (; i < N + 1; i++)
      CHECK(t_recv(&o.c, &r) && !r.error);
    o_close(&o);
  }
  free(r.data);
}

/* READs of a batch that are not in memory are asked for all at once, and one
 * worker does them, in their order; the others do not wait for it.  What comes
 * later waits for none of them.  Without memory they are done all the same.
 * Block k of the file is full of the byte k + 1, and the blocks from 16 on are
 * not in memory; nor is block 0, for which somebody would have to wait. */
static void i_away_reads(void) {
  enum {
    BLOCK = 4096,
    N = 24
  };
  static unsigned char all[N * 28], block[BLOCK];
  struct one o;
  struct t_reply r = {0};
  int i, how, n, done, fd = open(path, O_RDWR), tells = os_can_read_now(fd);
  for (i = 0; i < 32; i++) {
    memset(block, i + 1, BLOCK);
    CHECK(pwrite(fd, block, BLOCK, (off_t)i * BLOCK) == BLOCK);
  }
  close(fd);
  fi_away = 16 * BLOCK;
  fi_away_end = 32 * BLOCK;
  /* Cookie i: block 30 - i, so no two make a run; but the last is block 0. */
  for (i = 0; i < N; i++)
    t_head(all + 28 * i, 0, READ, (uint32_t)i,
           i < N - 1 ? (uint64_t)(30 - i) * BLOCK : 0, BLOCK);
  for (how = 0; how < 2 && tells; how++) { /* simple and structured replies */
    unsigned seen = 0, next = 0;
    i_open(&o, how);
    i_set_cpus(o.s, 1); /* all of them in one batch */
    fi[THREAD].calls = fi_advised = 0;
    t_hold(&fi[PREAD].hold, 1);
    CHECK(t_write(o.c.fd, all, sizeof all) == 0);
    for (i = 0; i < N - 1; i++) {
      CHECK(t_recv(&o.c, &r) && !r.error && r.done && r.len == BLOCK);
      uint32_t k = (uint32_t)r.cookie;
      CHECK(k < N - 1 && !(seen >> k & 1));
      CHECK(k > 14 || k == next++); /* in their order */
      CHECK(r.data[0] == (char)(31 - k) && r.data[BLOCK - 1] == r.data[0]);
      seen |= 1u << k;
    }
    CHECK(fi_calls(THREAD, 1) == 1 && fi_advised >= 16);
    CHECK(t_do(&o.c, 0, READ, 20 * BLOCK, BLOCK, block) == 0 && *block == 21);
    CHECK(t_do(&o.c, FUA, WRITE, 20 * BLOCK, BLOCK, block) == 0);
    t_hold(&fi[PREAD].hold, 0);
    CHECK(t_recv(&o.c, &r) && (uint32_t)r.cookie == N - 1 && !r.error);
    CHECK(r.data[0] == 1 && r.data[BLOCK - 1] == 1);
    o_close(&o);
  }
  for (n = 1, done = 0; !done; n++) {
    i_open(&o, 1);
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = n;
    CHECK(t_write(o.c.fd, all, sizeof all) == 0);
    for (i = 0; i < N; i++) {
      CHECK(t_recv(&o.c, &r) && !r.error && r.len == BLOCK);
      uint32_t k = (uint32_t)r.cookie;
      CHECK(r.data[7] == (char)(k == N - 1 ? 1 : 31 - k));
    }
    done = fi[MALLOC].calls < n;
    fi[MALLOC].bad = 0;
    o_close(&o);
  }
  fi_away = fi_away_end = 0;
  CHECK(n > 3 || !tells);
  free(r.data);
}

/* READs that would have to be waited for are not done for a client that has
 * gone, as soon as that is known: no more than a few are. */
static void i_gone_away_reads(void) {
  enum {
    BLOCK = 4096,
    N = 100
  };
  static unsigned char all[N * 28];
  struct one o;
  int i, fd = open(path, O_RDWR), tells = os_can_read_now(fd);
  CHECK(ftruncate(fd, 256 * BLOCK) == 0);
  close(fd);
  for (i = 0; i < N;
       i++) /* the first one is block 0, which holds up the rest */
    t_head(all + 28 * i, 0, READ, (uint32_t)i, 2u * (uint32_t)i * BLOCK, BLOCK);
  i_open(&o, 0);
  fi_away = BLOCK;
  fi_away_end = 256 * BLOCK;
  t_hold(&fi[PREAD].hold, 1);
  CHECK(t_write(o.c.fd, all, sizeof all) == 0);
  usleep(100000);
  fi_calls(PREAD, 1);
  shutdown(o.c.fd, SHUT_RDWR);
  close(o.c.fd);
  usleep(100000);
  t_hold(&fi[PREAD].hold, 0);
  s_end(&o.v);
  CHECK(!tells || fi_calls(PREAD, 0) < 20);
  nbdserve_free(o.s);
  fi_away = fi_away_end = 0;
  CHECK(truncate(path, 65536) == 0);
}

/* The data of a long simple reply is in one piece, whatever else gets ready
 * while it is being sent */
static void i_whole(void) {
  enum {
    LONG = 8 << 20
  };
  unsigned char *b = t_alloc(LONG + 100), all[3 * 28];
  struct one o;
  int call, i;
  CHECK(truncate(path, LONG) == 0);
  for (call = 0; call < 2; call++) {
    int *hold = &fi[call ? SYNC : FALLOCATE].hold;
    i_open(&o, 0);
    t_hold(hold, 1);
    t_head(all, 0, CACHE, 1, 0, 512);
    t_head(all + 28, 0, call ? FLUSH : TRIM, 2, 0, 512);
    t_head(all + 56, 0, READ, 3, 0, LONG);
    CHECK(t_write(o.c.fd, all, sizeof all) == 0);
    usleep(50000);
    t_hold(hold, 0);
    usleep(50000);
    CHECK(t_read(o.c.fd, b, LONG + 48) == LONG + 48);
    for (i = 0; i < LONG + 48 && t_get(b + i + 12, 4) != 3; i += 16)
      CHECK(t_get(b + i, 8) == UINT64_C(0x6744669800000000));
    for (i += 16; i < LONG + 48 && !b[i]; i++)
      ;
    CHECK(i >= LONG + 16); /* behind it at most the others' replies */
    o_close(&o);
  }
  CHECK(truncate(path, 65536) == 0);
}

static void i_fallocate(void) {
  static unsigned char b[65536];
  static const char *const names[] = {"EPERM", "ENOSYS", "EOPNOTSUPP",
                                      "EINVAL"};
  static const int errors[] = {EPERM, ENOSYS, EOPNOTSUPP, EINVAL};
  struct one o;
  int i, n = 0;
  while (strcmp(error_name, names[n]))
    CHECK(++n < COUNT(names));
  i_open(&o, 1);
  memset(b, 'x', sizeof b);
  CHECK(t_do(&o.c, 0, WRITE, 0, 65536, b) == 0);
  fi[FALLOCATE].err = errors[n];
  fi[FALLOCATE].times = -1;
  CHECK(t_do(&o.c, 0, ZEROES, 100, 30000, NULL) == 0);
  CHECK(t_do(&o.c, NO_HOLE | FUA, ZEROES, 40000, 25000, NULL) == 0);
  CHECK(t_do(&o.c, 0, TRIM, 65100, 400, NULL) == 0);
  if (errors[n] != EINVAL) {
    i = fi[FALLOCATE].calls;
    CHECK(t_do(&o.c, 0, ZEROES, 200, 30000, NULL) == 0);
    CHECK(t_do(&o.c, NO_HOLE, ZEROES, 200, 30000, NULL) == 0);
    CHECK(t_do(&o.c, 0, TRIM, 65100, 400, NULL) == 0);
    CHECK(fi[FALLOCATE].calls == i); /* remembered */
  }
  CHECK(t_do(&o.c, 0, READ, 0, 65536, b) == 0);
  for (i = 0; i < 65000; i++)
    CHECK(b[i] == (i < 100 || (i >= 30200 && i < 40000) ? 'x' : 0) ||
          (n == 3 && i >= 30100 && i < 30200));
  o_close(&o);
}

static void i_fastzero(void) {
  static char b[4096];
  struct one o;
  i_open(&o, 1);
  memset(b, 'x', sizeof b);
  CHECK(t_do(&o.c, 0, WRITE, 0, 4096, b) == 0);
  fi[FALLOCATE].err = EOPNOTSUPP;
  fi[FALLOCATE].times = -1;
  fi[PWRITE].calls = 0;
  CHECK(t_do(&o.c, FAST, ZEROES, 0, 4096, NULL) == 95);
  CHECK(t_do(&o.c, FAST | NO_HOLE, ZEROES, 0, 4096, NULL) == 95);
  CHECK(fi[PWRITE].calls == 0);
  CHECK(t_do(&o.c, 0, READ, 0, 4096, b) == 0 && b[0] == 'x' && b[4095] == 'x');
  CHECK(t_do(&o.c, 0, ZEROES, 0, 4096, NULL) == 0);
  CHECK(t_do(&o.c, 0, READ, 0, 4096, b) == 0 && b[0] == 0 && b[4095] == 0);
  o_close(&o);
}

static void i_threads(void) {
  static char b[4096];
  struct one o;
  int structured, i;
  fi[THREAD].err = EAGAIN;
  fi[THREAD].times = -1;
  for (structured = 0; structured < 2; structured++) {
    i_open(&o, structured);
    for (i = 0; i < 3; i++) {
      CHECK(t_do(&o.c, FUA, WRITE, 0, 4096, b) == 0);
      CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 0);
      CHECK(t_do(&o.c, 0, TRIM, 0, 4096, NULL) == 0);
      CHECK(t_do(&o.c, 0, ZEROES, 0, 4096, NULL) == 0);
      CHECK(t_do(&o.c, 0, READ, 0, 4096, b) == 0);
    }
    o_close(&o);
  }
}

struct i_racer {
  pthread_t thread;
  struct nbdserve *s;
  const char *address;
  int err;
};

static void *i_race(void *arg) {
  struct i_racer *r = arg;
  r->err = nbdserve_listen(r->s, r->address);
  return NULL;
}

/* Three servers want a leftover at once: one gets it */
static void i_stale(void) {
  struct i_racer r[3];
  struct sockaddr_un a = {0};
  char address[200];
  int i, round, fd, up;
  a.sun_family = AF_UNIX;
  snprintf(a.sun_path, sizeof a.sun_path, "%s.s", path);
  snprintf(address, sizeof address, "unix:%s", a.sun_path);
  for (round = 0; round < 3; round++) {
    CHECK((fd = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0);
    CHECK(bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && close(fd) == 0);
    for (i = 0; i < 3; i++) {
      r[i].address = address;
      CHECK(nbdserve_new(&r[i].s, NULL) == 0);
      CHECK(pthread_create(&r[i].thread, NULL, i_race, &r[i]) == 0);
    }
    for (i = up = 0; i < 3; i++) {
      pthread_join(r[i].thread, NULL);
      CHECK(r[i].err == 0 || r[i].err == -EADDRINUSE);
      up += r[i].err == 0;
    }
    CHECK(up == 1);
    CHECK((fd = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0);
    CHECK(connect(fd, (struct sockaddr *)&a, sizeof a) == 0 && close(fd) == 0);
    for (i = 0; i < 3; i++)
      nbdserve_free(r[i].s);
    CHECK(access(a.sun_path, F_OK) < 0);
  }
}

/* Every allocation fails once: an error or a lost client, no more */
static void i_memory(void) {
  static char b[65536];
  int n, done = 0;
  for (n = 0; n < 400 && !done; n++) {
    struct nbdserve *s = NULL;
    struct nbdserve_export e = {0};
    struct served v = {0};
    struct t_conn c;
    int err;
    fi[MALLOC].calls = 0;
    fi[MALLOC].err = ENOMEM;
    fi[MALLOC].times = 0;
    fi[MALLOC].bad = n + 1;
    err = nbdserve_new(&s, NULL);
    if (!err) err = nbdserve_flat_open(path, NULL, &e);
    if (!err && (err = nbdserve_add(s, &e)) != 0) e.ops->close(e.ctx);
    if (!err) {
      s_start(&v, s, &c);
      if (t_open(&c, c.fd, "", 1) == 0 &&
          t_do(&c, 0, WRITE, 0, 65536, b) >= 0 &&
          t_do(&c, FUA, ZEROES, 0, 4096, NULL) >= 0 &&
          t_do(&c, 0, STATUS, 0, 4096, NULL) >= 0 &&
          t_do(&c, 0, READ, 0, 65536, b) >= 0)
        (void)t_send(&c, 0, DISC, 0, 0, 0, NULL);
      close(c.fd);
      (void)s_end(&v);
    }
    nbdserve_free(s);
    CHECK(err == 0 || err == -ENOMEM);
    done = fi[MALLOC].calls <= n;
  }
  CHECK(done && n > 3);
}

/* A device that refuses writes is not offered as writable */
static void i_readonly(void) {
  struct nbdserve_flat flat = {0};
  struct nbdserve_export e = {0};
  fi_device = fi_readonly = 1;
  CHECK(nbdserve_flat_open(path, NULL, &e) == -EROFS);
  flat.flags = NBDSERVE_FLAT_READONLY;
  CHECK(nbdserve_flat_open(path, &flat, &e) == 0);
  CHECK(e.flags & NBDSERVE_EXPORT_READONLY);
  e.ops->close(e.ctx);
  flat.flags = NBDSERVE_FLAT_TEMPORARY;
  memset(&e, 0, sizeof e);
  CHECK(nbdserve_flat_open(path, &flat, &e) == 0);
  CHECK(!(e.flags & NBDSERVE_EXPORT_READONLY));
  e.ops->close(e.ctx);
  fi_readonly = 0;
  CHECK(nbdserve_flat_open(path, NULL, &e) == 0);
  e.ops->close(e.ctx);
}

/* A new file is removed if anything after fails, and only if it is ours */
static void i_create(void) {
  struct nbdserve_flat flat = {0};
  struct nbdserve_export e = {0};
  char name[300];
  int n, fd, err = -1;
  snprintf(name, sizeof name, "%s.new", path);
  flat.create = 65536;
  for (n = 0; n < 2; n++) { /* the file's sync, the directory's */
    fi[SYNC].err = EIO;
    fi[SYNC].skip = n;
    fi[SYNC].times = 1;
    CHECK(nbdserve_flat_open(name, &flat, &e) == -EIO && !fi[SYNC].times);
    CHECK(access(name, F_OK) < 0);
  }
  for (n = 1; err; n++) { /* each allocation */
    CHECK(n < 10);
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = n;
    err = nbdserve_flat_open(name, &flat, &e);
    CHECK(err == 0 || (err == -ENOMEM && access(name, F_OK) < 0));
  }
  fi[MALLOC].bad = 0;
  CHECK(n > 2 && access(name, F_OK) == 0);
  CHECK(nbdserve_flat_open(name, &flat, &e) == -EBUSY);
  flat.flags = 1u << 31; /* one that there is not */
  CHECK(nbdserve_flat_open(name, &flat, &e) == -EINVAL);
  flat.flags = 0;
  CHECK(access(name, F_OK) == 0);
  e.ops->close(e.ctx);
  CHECK(unlink(name) == 0);
  flat.flags = NBDSERVE_FLAT_TEMPORARY;
  flat.dir = "/no/such/directory"; /* for the overlay */
  CHECK(nbdserve_flat_open(name, &flat, &e) == -ENOENT);
  CHECK(access(name, F_OK) < 0);
  CHECK((fd = open(name, O_RDWR | O_CREAT, 0600)) >= 0);
  CHECK(ftruncate(fd, 1000) == 0 && close(fd) == 0);
  CHECK(nbdserve_flat_open(name, &flat, &e) == -ENOENT);
  CHECK(access(name, F_OK) == 0);
}

/* A failed sync fails writes that are done in one call, too */
static void i_syncrun(void) {
  static unsigned char in[16000];
  struct one o;
  i_open(&o, 1);
  CHECK(i_neighbours(&o.c, WRITE, in) == 0);
  fi[SYNC].err = EIO;
  fi[SYNC].times = 1;
  CHECK(t_do(&o.c, 0, FLUSH, 0, 0, NULL) == 5);
  fi[PWRITE].calls = 0;
  CHECK(i_neighbours(&o.c, WRITE, in) == 0xffff);
  CHECK(fi[PWRITE].calls == 0);
  CHECK(i_neighbours(&o.c, READ, in) == 0);
  o_close(&o);
}

/* What is temporary never has a name, where the system has O_TMPFILE; else
 * mkstemp makes one up, for a moment */
static void i_nameless(void) {
  struct nbdserve_flat flat = {0};
  struct nbdserve_export e = {0};
  static char dir[5000];
  char *slash;
  int way, fd;
  strcpy(dir, path);
  CHECK((slash = strrchr(dir, '/')) != NULL);
  *slash = 0;
  flat.flags = NBDSERVE_FLAT_TEMPORARY;
  flat.dir = dir;
#ifdef O_TMPFILE
  fd = open(dir, O_TMPFILE | O_RDWR, 0600);
#else
  fd = -1;
#endif
  for (way = fd < 0; way < 2; way++) {
    fi_tmpfile = way ? EOPNOTSUPP : 0;
    CHECK(nbdserve_flat_open(path, &flat, &e) == 0);
    CHECK(fi_named == way);
    if (way) {
      struct stat st;
      CHECK(fcntl(fi_named_fd, F_GETFD) == FD_CLOEXEC);
      CHECK(fstat(fi_named_fd, &st) == 0 && !st.st_nlink);
    }
    e.ops->close(e.ctx);
  }
  if (fd >= 0) close(fd);
  memset(dir, '/', sizeof dir - 1); /* the root, said at length */
  CHECK(nbdserve_flat_open(path, &flat, &e) == -ENAMETOOLONG);
}

/* Each WRITE with FUA is followed by a sync before it is answered, wherever it
 * stands among others that were sent together, and nothing else is */
static void i_fua(void) {
  static char b[4096];
  int which, mode, i, n;
  for (mode = 0; mode < 3; mode++)
    for (which = 0; which <= 4; which++) { /* 4: none has FUA */
      struct t_reply r = {0};
      struct one o;
      unsigned char all[4 * (32 + 4096)], *p = all;
      i_open(&o, mode);
      for (i = 0; i < 4; i++) {
        t_head(p, i == which ? FUA : 0, WRITE, (uint32_t)i, 4096u * (unsigned)i,
               4096);
        if (mode == 2) {
          t_put(p, 4, 0x21e41c71);
          p[5] |= PAYLOAD;
          t_put(p + 24, 8, 4096);
        }
        p += mode == 2 ? 32 : 28;
        memcpy(p, b, 4096);
        p += 4096;
      }
      n = fi[SYNC].calls;
      CHECK(t_write(o.c.fd, all, (size_t)(p - all)) == 0);
      for (i = 0; i < 4; i++) {
        CHECK(t_recv(&o.c, &r) && !r.error);
        if ((uint32_t)r.cookie == (uint32_t)which) {
          CHECK(fi[SYNC].calls > n);
          CHECK(fi_synced_at > fi_written_at[which]);
        }
      }
      CHECK((fi[SYNC].calls > n) == (which < 4));
      free(r.data);
      n = fi[SYNC].calls;
      CHECK(t_do(&o.c, 0, ZEROES, 0, 4096, NULL) == 0);
      CHECK(t_do(&o.c, 0, TRIM, 0, 4096, NULL) == 0);
      CHECK(fi[SYNC].calls == n);
      CHECK(t_do(&o.c, FUA, ZEROES, 0, 4096, NULL) == 0);
      CHECK(fi[SYNC].calls > n);
      n = fi[SYNC].calls;
      if (o.c.flags & 0x20) CHECK(t_do(&o.c, FUA, TRIM, 0, 4096, NULL) == 0);
      CHECK(fi[SYNC].calls > n || !(o.c.flags & 0x20));
      o_close(&o);
    }
}

static void i_must_have_synced(void) {
  if (fi_must_sync) _exit(99);
}

/* Runs a command of the program, which must succeed, in a child of its own */
static void i_command(char *word, char *store, char *file, const char *synced) {
  char *argv[] = {"nbdserve", word, store, file, NULL};
  int status;
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    fi_must_sync = synced;
    atexit(i_must_have_synced);
    exit(fault_main(file ? 4 : 3, argv)); /* or the command does that */
  }
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

/* What a command says it has written is on the medium: a store with its
 * directory, and a file that was exported */
static void i_export(void) {
#if !NBDSERVE_NO_CAS
  char store[300], volume[310], out[300];
  snprintf(store, sizeof store, "%s.store", path);
  snprintf(volume, sizeof volume, "%s::v", store);
  snprintf(out, sizeof out, "%s.out", path);
  i_command("init", store, NULL, store);
  i_command("import", volume, strcpy(out, path), store);
  snprintf(out, sizeof out, "%s.out", path);
  i_command("export", volume, out, out);
#endif
}

/* Can this machine listen on both loopback addresses? */
static int i_has_ipv6(void) {
  struct sockaddr_in6 a;
  int fd = socket(AF_INET6, SOCK_STREAM, 0), ok;
  memset(&a, 0, sizeof a);
  a.sin6_family = AF_INET6;
  a.sin6_addr.s6_addr[15] = 1;
  ok = fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0;
  if (fd >= 0) close(fd);
  return ok;
}

/* The port that the kernel picks for 127.0.0.1 may be taken on ::1: then it
 * picks another one; what cannot be had leaves no half behind */
static void i_loopbacks(void) {
#if !NBDSERVE_NO_TCP
  struct nbdserve *s;
  char uri[100];
  if (!i_has_ipv6()) return;
  CHECK(nbdserve_new(&s, NULL) == 0);
  fi[BIND6].calls = 0;
  fi[BIND6].err = EADDRINUSE;
  fi[BIND6].times = 2;
  CHECK(nbdserve_listen(s, "tcp:localhost:0") == 0);
  CHECK(fi[BIND6].times == 0 && fi[BIND6].calls == 3);
  CHECK(nbdserve_uri(s, "", uri, sizeof uri) == 0);
  CHECK(!strncmp(uri, "nbd://127.0.0.1:", 16));
  nbdserve_free(s);
  CHECK(nbdserve_new(&s, NULL) == 0);
  fi[BIND6].times = -1;
  CHECK(nbdserve_listen(s, "tcp:localhost:0") == -EADDRINUSE);
  CHECK(nbdserve_uri(s, "", uri, sizeof uri) == -ENOENT);
  fi[BIND6].err = EACCES;
  CHECK(nbdserve_listen(s, "tcp:localhost:0") == -EACCES);
  CHECK(nbdserve_uri(s, "", uri, sizeof uri) == -ENOENT);
  fi[BIND6].err = EADDRNOTAVAIL; /* a machine without IPv6 */
  CHECK(nbdserve_listen(s, "tcp:localhost:0") == 0);
  CHECK(nbdserve_uri(s, "", uri, sizeof uri) == 0);
  nbdserve_free(s);
#endif
}

static void *i_run(void *s) {
  return (void *)(intptr_t)nbdserve_run(s);
}

/* A TCP peer that is gone without a word is noticed within minutes: keepalive
 * is on, begins after about a minute, and does not take for ever */
static void i_keepalive(void) {
#if !NBDSERVE_NO_TCP
  struct nbdserve_export e = {0};
  struct sockaddr_in a;
  struct nbdserve *s;
  struct t_conn c;
  pthread_t run;
  char uri[100];
  CHECK(nbdserve_flat_open(path, NULL, &e) == 0);
  CHECK(nbdserve_new(&s, NULL) == 0 && nbdserve_add(s, &e) == 0);
  CHECK(nbdserve_listen(s, "tcp:127.0.0.1:0") == 0);
  CHECK(nbdserve_uri(s, "", uri, sizeof uri) == 0);
  memset(&a, 0, sizeof a);
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  a.sin_port = htons((uint16_t)atoi(strrchr(uri, ':') + 1));
  CHECK(pthread_create(&run, NULL, i_run, s) == 0);
  c.fd = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(c.fd, (struct sockaddr *)&a, sizeof a) == 0);
  CHECK(t_open(&c, c.fd, "", 0) == 0);
  CHECK(fi_keepalive == 1);
#ifdef TCP_KEEPIDLE
  CHECK(fi_keepidle > 0 && fi_keepidle <= 90);
  CHECK(fi_keepintvl > 0 && fi_keepcnt > 0);
  CHECK(fi_keepintvl * fi_keepcnt <= 180);
#endif
  t_close(&c);
  nbdserve_stop(s);
  CHECK(pthread_join(run, NULL) == 0);
  nbdserve_free(s);
#endif
}

/* ---- Every allocation of a whole session fails once ---- */

enum {
  Y_MOST = 5 << 18 /* more than is done in one piece */
};
static uint32_t y_size; /* of the export */
static struct nbdserve *y_server;
static struct t_conn y_conn;
static pthread_t y_runs;
static int y_mode; /* of replies: simple, structured, extended */
static unsigned char y_model[Y_MOST], y_got[Y_MOST];

static int y_fired(void) {
  int fired;
  pthread_mutex_lock(&fi_lock);
  fired = fi[MALLOC].calls >= fi[MALLOC].bad;
  pthread_mutex_unlock(&fi_lock);
  return fired;
}

/* Only once is there no memory: what fails has to be what lacked it, to say so,
 * or to lose the client (-1), and to succeed when it is done again. */
#define Y_TWICE(x) \
  do { \
    int before_ = y_fired(), err_ = (x); \
    if (err_) { \
      CHECK(!before_ && y_fired()); \
      CHECK(err_ == -1 || err_ == -ENOMEM || err_ == 12); \
      CHECK((x) == 0); \
    } \
  } while (0)

static int y_socket(void) {
  struct sockaddr_un a = {0};
  int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  a.sun_family = AF_UNIX;
  snprintf(a.sun_path, sizeof a.sun_path, "%s.s", path);
  CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
  return fd;
}

/* Every option, and what ends its answer */
static int y_options(void) {
  static const struct {
    uint32_t number, answer, len;
    const char *data;
  } all[] = {
      {3, 1, 0, ""},
      {4, 0x80000001, 0, ""},
      {5, 0x80000001, 0, ""},
      {6, 1, 15, "\0\0\0\1v\0\4\0\0\0\1\0\2\0\3"},
      {8, 1, 0, ""},
      {9, 1, 9, "\0\0\0\1v\0\0\0\0"},
      {10, 1, 28, "\0\0\0\1v\0\0\0\1\0\0\0\17base:allocation"},
      {11, 1, 0, ""},
      {99, 0x80000001, 3, "abc"},
      {2, 1, 0, ""},
  };
  unsigned char b[4200] = {0, 0, 0, 3};
  uint32_t type = 1;
  int i, fd = y_socket();
  if (t_write(fd, b, 4) || t_read(fd, b, 18) != 18) type = 0;
  for (i = 0; type && i < COUNT(all); i++) {
    if (t_option(fd, all[i].number, all[i].data, all[i].len)) type = 0;
    while (type && (type = t_answer(fd, b)) > 1 && type < 1u << 31)
      ;
    if (type != all[i].answer) type = 0;
  }
  close(fd);
  return type ? 0 : -1;
}

static int y_connect(void) {
  int fd = y_socket();
  if (!t_open(&y_conn, fd, "v", y_mode)) return 0;
  close(fd);
  return -1;
}

/* A request, on a new connection if it loses this one */
static int y_request(int flags, int command, uint64_t off, uint32_t len,
                     void *data) {
  int err = t_do(&y_conn, flags, command, off, len, data);
  if (err >= 0) return err;
  close(y_conn.fd);
  Y_TWICE(y_connect());
  return -1;
}

static void y_write(int flags, uint64_t off, uint32_t len) {
  Y_TWICE(y_request(flags, WRITE, off, len, y_model + off));
}

static void y_compare(void) {
  Y_TWICE(y_request(0, READ, 0, y_size, y_got));
  CHECK(!memcmp(y_got, y_model, y_size));
}

/* Each kind of request, long ones, too; leaves in the model what has to be
 * there.  mark: what is different from the last time */
static void y_requests(int mark) {
  uint32_t i;
  memset(y_model, mark, y_size);
  for (i = 0; i < y_size; i += 4096)
    t_put(y_model + i, 4, i + 1); /* no two blocks are the same */
  y_write(0, 0, y_size);
  memset(y_model + 5000, mark + 1, 8000);
  y_write(FUA, 5000, 8000);
  memset(y_model + 65536, 0, 66000);
  Y_TWICE(y_request(0, ZEROES, 65536, 66000, NULL));
  memset(y_model + 150000, 0, 100000);
  Y_TWICE(y_request(0, TRIM, 150000, 100000, NULL)); /* which may do nothing */
  Y_TWICE(y_request(NO_HOLE, ZEROES, 150000, 100000, NULL));
  if (y_conn.flags & 0x400) Y_TWICE(y_request(0, CACHE, 0, y_size, NULL));
  if (y_mode) Y_TWICE(y_request(0, STATUS, 0, y_size, NULL));
  y_compare();
  Y_TWICE(y_request(0, READ, 70000, 3000, y_got));
  Y_TWICE(y_request(0, FLUSH, 0, 0, NULL));
}

static int y_flat_open(struct nbdserve_export *e) {
  int err;
  memset(e, 0, sizeof *e);
  e->name = "v";
  err = nbdserve_flat_open(path, NULL, e);
  if (!err && (err = nbdserve_add(y_server, e)) != 0) e->ops->close(e->ctx);
  return err;
}

/* A server of the file or, with a configuration, of what that finds */
static int y_begin(const struct nbdserve_config *config) {
  struct nbdserve_export e;
  char address[300];
  int err = nbdserve_new(&y_server, config);
  snprintf(address, sizeof address, "unix:%s.s", path);
  if (!err && !config) err = y_flat_open(&e);
  if (!err) err = nbdserve_listen(y_server, address);
  if (err) nbdserve_free(y_server);
  return err;
}

static void y_start(const struct nbdserve_config *config) {
  Y_TWICE(y_begin(config));
  CHECK(pthread_create(&y_runs, NULL, i_run, y_server) == 0);
  Y_TWICE(y_options());
  Y_TWICE(y_connect());
}

static void y_stop(void) {
  void *err;
  t_close(&y_conn);
  nbdserve_stop(y_server);
  CHECK(pthread_join(y_runs, &err) == 0 && !err);
  nbdserve_free(y_server);
}

/* The n-th allocation from here on fails; after that says whether there was
 * such a one, and that nothing is left of all there were. */
static long y_blocks;

static void y_arm(int n) {
  alarm(30);
  y_blocks = fi_blocks;
  fi[MALLOC].calls = 0;
  fi[MALLOC].bad = n;
}

static int y_disarm(void) {
  int fired = y_fired();
  fi[MALLOC].bad = 0;
  CHECK(fi_blocks == y_blocks);
  return fired;
}

static void i_starved(void) {
  int n, step = atoi(error_name), fd = open(path, O_RDWR);
  CHECK(step > 0);
  fi_no_disk = 1;
  y_size = Y_MOST;
  CHECK(fd >= 0 && ftruncate(fd, y_size) == 0);
  for (y_mode = 0; y_mode < 3; y_mode++) {
    n = 0;
    do {
      y_arm(n += step);
      y_start(NULL);
      y_requests(n);
      y_stop();
      CHECK(pread(fd, y_got, y_size, 0) == (ssize_t)y_size);
      CHECK(!memcmp(y_got, y_model, y_size));
    } while (y_disarm());
    CHECK(n > 9);
  }
  CHECK(ftruncate(fd, 65536) == 0 && close(fd) == 0);
}

static void i_never_closed(void *ctx) {
  (void)ctx;
  CHECK(!"close is called");
}

/* Memory that lacks: what needs it fails, gives back what it got and nothing
 * else, and the host keeps what is the host's */
static void i_scarce(void) {
  static struct nbdserve_ops ops;
  struct nbdserve_export flat = {0}, e = {0};
  struct nbdserve *s;
  struct t_conn c;
  struct served v = {0};
  int n, err, done = 0;
  CHECK(nbdserve_flat_open("mem:64K", NULL, &flat) == 0);
  ops.read = flat.ops->read;
  ops.close = i_never_closed;
  e.ops = &ops;
  e.size = 65536;
  e.ctx = flat.ctx;
  for (n = 1; !done; n++) {
    long blocks = fi_blocks;
    CHECK(n < 100);
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = n;
    s = (struct nbdserve *)(void *)&flat;
    err = nbdserve_new(&s, NULL);
    CHECK(err == 0 || (err < 0 && s == NULL));
    if (!err) {
      err = nbdserve_add(s, &e);
      CHECK(err <= 0);
      if (err) { /* it may be added later; nobody has closed it */
        fi[MALLOC].bad = 0;
        CHECK(nbdserve_add(s, &e) == 0);
      } else {
        s_start(&v, s, &c);
        err = t_open(&c, c.fd, "", 1) ? -1 : 0;
        if (!err) t_close(&c);
        if (err) close(c.fd);
        err = s_end(&v);
      }
      ops.close = NULL;
      nbdserve_free(s);
      ops.close = i_never_closed;
    }
    done = fi[MALLOC].calls < n;
    fi[MALLOC].bad = 0;
    CHECK(fi_blocks == blocks);
    CHECK(done ? err == 0 : err < 0);
  }
  CHECK(n > 3);
  flat.ops->close(flat.ctx);
  for (n = 1, done = 0; !done; n++) { /* the backends' own */
    long blocks = fi_blocks;
    struct nbdserve_export mine = {0};
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = n;
    err = nbdserve_flat_open("mem:64K", NULL, &mine);
    CHECK(err <= 0);
    if (!err) mine.ops->close(mine.ctx);
    done = fi[MALLOC].calls < n;
    fi[MALLOC].bad = 0;
    CHECK(fi_blocks == blocks);
    CHECK(done ? err == 0 : err < 0);
  }
}

static void *i_read_first(void *export) {
  struct nbdserve_export *e = export;
  char b[512];
  return (void *)(intptr_t)e->ops->read(e->ctx, b, 0, sizeof b, 0);
}

/* A slow read or write of a temporary export holds up no other one, but a write
 * that brings the same block to the overlay. */
static void i_overlay(void) {
  struct nbdserve_flat o = {0};
  struct nbdserve_export e = {0};
  unsigned char b[512] = {7};
  pthread_t slow;
  void *err;
  CHECK(truncate(path, 1 << 20) == 0);
  o.flags = NBDSERVE_FLAT_TEMPORARY;
  CHECK(nbdserve_flat_open(path, &o, &e) == 0);
  t_hold(&fi[PREAD].hold, 1);
  CHECK(pthread_create(&slow, NULL, i_read_first, &e) == 0);
  usleep(50000);
  CHECK(e.ops->read(e.ctx, b, 512, 512, 0) == 0);
  CHECK(e.ops->write(e.ctx, b, 65536, 512, 0) == 0);
  CHECK(e.ops->read(e.ctx, b, 65536, 512, 0) == 0);
  t_hold(&fi[PREAD].hold, 0);
  CHECK(pthread_join(slow, &err) == 0 && !err);
  e.ops->close(e.ctx);
}

#if !NBDSERVE_NO_CAS
static struct nbdserve_cas *i_cas;
static struct nbdserve_export i_volume;
static int i_lenient; /* slots are held by nobody who is known */
static long i_blocks; /* fi_blocks before it was opened */

static void cas_check(struct nbdserve_cas *st, int how);
enum {
  CK_LENIENT = 1, /* see cas_check */
  CK_FORGED = 2
};

static int ck_bytes(void *to, uint64_t off, size_t len) {
  int fd = open(path, O_RDONLY);
  ssize_t n = pread(fd, to, len, (off_t)off);
  close(fd);
  return n == (ssize_t)len ? 0 : -1;
}

static void ck_fail(const char *what, int line, uint32_t at) {
  fprintf(stderr, "line %d: %s: of %u\n", line, what, at);
  exit(1);
}

static int i_cas_open(uint32_t flags) {
  struct nbdserve_cas_options o = {0};
  int err;
  o.flags = flags;
  memset(&i_volume, 0, sizeof i_volume);
  i_blocks = fi_blocks;
  err = nbdserve_cas_open(path, &o, &i_cas);
  if (!err) CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  if (!err) cas_check(i_cas, 0);
  return err;
}

static int i_cas_close(void) {
  int err;
  i_volume.ops->close(i_volume.ctx);
  cas_check(i_cas, i_lenient ? CK_LENIENT : 0);
  err = nbdserve_cas_close(i_cas);
  CHECK(fi_blocks == i_blocks);
  return err;
}

/* Fills a block with a number, as 4 bytes after 4 bytes. */
static int i_put(uint64_t block, int number) {
  int b[1024], i;
  for (i = 0; i < COUNT(b); i++)
    b[i] = number;
  return i_volume.ops->write(i_volume.ctx, b, block * 4096, sizeof b, 0);
}

/* The number that a block is filled with, or -errno */
static int i_get(uint64_t block) {
  int b[1024];
  int err = i_volume.ops->read(i_volume.ctx, b, block * 4096, sizeof b, 0);
  CHECK(err || !memcmp(b, b + 1, sizeof b - sizeof *b));
  return err ? err : b[0];
}

static int i_flush(void) {
  return i_volume.ops->flush(i_volume.ctx, 0);
}

/* Does block 0 of the volume have that letter in it? */
static int i_cas_has(int letter) {
  return i_get(0) == letter;
}

static int i_cas_write(int letter) {
  return i_put(0, letter);
}

/* Reads or writes the file behind the store's back. */
static void i_peek(off_t at, void *p, size_t len) {
  int fd = open(path, O_RDONLY);
  CHECK(pread(fd, p, len, at) == (ssize_t)len);
  close(fd);
}

static void i_poke(off_t at, const void *p, size_t len) {
  int fd = open(path, O_RDWR);
  CHECK(pwrite(fd, p, len, at) == (ssize_t)len);
  close(fd);
}

static void i_flip(off_t at) {
  char b;
  i_peek(at, &b, 1);
  b ^= 16;
  i_poke(at, &b, 1);
}

/* Where the log begins that the superblock names */
static uint64_t i_replay(void) {
  unsigned char b[8];
  i_peek(40, b, 8);
  return u_get64(b);
}

static off_t i_log_at(uint64_t seq) {
  return (2 << 20) + (off_t)(seq % 4096 * 4096);
}

/* Where the next log page goes, after all was closed in order */
static off_t i_log_place(void) {
  return i_log_at(i_replay());
}

/* A place of the log that cannot be written ends a process, but not the store:
 * the next one passes over it if it cannot be read, either, and else repair
 * does.  What a page says that cannot be written again is not lost: it may have
 * been flushed. */
static void i_badlog(void) {
  int status;
  pid_t pid;
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  fi[PWRITE].bad = i_log_place();
  CHECK(i_cas_open(0) == 0);
  CHECK(i_cas_write('a') == -EIO);
  CHECK(i_cas_close() == -EIO);
  CHECK(i_cas_open(0) == 0); /* nothing says that it is bad */
  CHECK(i_cas_write('b') == -EIO);
  CHECK(i_cas_close() == -EIO);
  CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == 0);
  CHECK(i_cas_write('c') == 0 && i_cas_has('c'));
  CHECK(i_volume.ops->flush(i_volume.ctx, 0) == 0);
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_cas_has('c') && i_cas_close() == 0);

  fi[PWRITE].bad = fi[PREAD].bad = i_log_place();
  CHECK(i_cas_open(0) == 0);
  CHECK(i_cas_write('d') == 0 && i_cas_has('d'));
  CHECK(i_cas_close() == 0);
  fi[PREAD].bad = fi[PWRITE].bad = 0;

  CHECK((pid = fork()) >= 0);
  if (!pid) _exit(i_cas_open(0) || i_cas_write('e'));
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  fi[PWRITE].bad = i_log_place();
  CHECK(i_cas_open(0) == -EIO);
  CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == 0 && i_cas_has('e'));
  CHECK(i_cas_write('f') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_cas_has('f') && i_cas_close() == 0);
}
static int i_rolled_back;

static int i_roll_back(void *arg, uint64_t done, uint64_t total) {
  (void)arg, (void)total;
  if (done < 1 << 20 || i_rolled_back++) return 0;
  CHECK(nbdserve_cas_rollback(i_cas, "v@s") == 0);
  return 0;
}

static int i_named_damage(void *arg, const char *name, uint64_t off,
                          uint64_t len, const char *why) {
  (void)off, (void)len, (void)why;
  *(int *)arg += !strcmp(name, "v@s");
  return 0;
}

/* What a volume gets after it was checked is checked where it comes from. */
static void i_rollback(void) {
  struct cas_spot spot;
  int named = 0;
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  CHECK(i_cas_write('a') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  os_lock(&i_cas->lock);
  CHECK(!cas_find_spot(i_cas, cas_root(i_volume.ctx), 0, &spot) && spot.slot);
  cas_unlock(i_cas);
  CHECK(i_cas_write('b') == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(pwrite(i_cas->fd, "rot", 3, (off_t)cas_data_off(i_cas, spot.slot)) ==
        3);
  CHECK(nbdserve_cas_verify(i_cas, i_named_damage, i_roll_back, &named) ==
        -EUCLEAN);
  CHECK(i_rolled_back && named == 1);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

static int i_told_of;

static int i_tells(void *arg, const char *name, uint64_t off, uint64_t len,
                   const char *why) {
  (void)arg, (void)name, (void)why;
  CHECK(off == 0 && len == 4096);
  i_told_of++;
  return 0;
}

static int i_removes(void *arg, const struct nbdserve_cas_info *info) {
  ++*(int *)arg;
  CHECK(nbdserve_cas_rm(i_cas, info->name) == 0);
  return 0;
}

/* The sum of an empty log page, which is another one in each store */
static void i_log_sum(unsigned char sum[CAS_DIGEST_LEN]) {
  static const unsigned char page[CAS_PAGE];
  uint32_t mixed[2][SHA_STATE_WORDS];
  cas_log_sum(i_cas, page, 0, 0, mixed, sum);
}

/* A log page is of one store only; what waits to be free is not stored; extents
 * are those of whole blocks; each name of a damaged block is told; a list goes
 * on when its callback removes what it is told of. */
static void i_edges(void) {
  unsigned char sum[2][CAS_DIGEST_LEN];
  unsigned char extents[2 * WIRE_EXT_EXTENT_LEN];
  struct nbdserve_extents x = {0};
  struct nbdserve_cas_stat stat;
  struct cas_spot spot;
  int i, n = 0;
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  i_log_sum(sum[0]);
  i_cas->super.id[7] ^= 1;
  i_log_sum(sum[1]);
  i_cas->super.id[7] ^= 1;
  CHECK(memcmp(sum[0], sum[1], CAS_DIGEST_LEN) != 0);
  for (i = 0; i < 9; i++) {
    CHECK(i_cas_write('a' + i) == 0);
    nbdserve_cas_stat(i_cas, &stat);
    if (!i) n = (int)stat.stored;
    CHECK(stat.stored == (uint64_t)n);
  }
  x.left = 8192 - 512;
  x.max = 2;
  x.align = 1;
  x.each = 16;
  x.data = extents;
  CHECK(i_volume.ops->extents(i_volume.ctx, 512, x.left, 0, &x) == 0);
  CHECK(x.n == 2 && u_get64(extents) == 4096 - 512 && x.last_len == 4096);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@1") == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@2") == 0);
  os_lock(&i_cas->lock);
  CHECK(!cas_find_spot(i_cas, cas_root(i_volume.ctx), 0, &spot) && spot.slot);
  cas_unlock(i_cas);
  i_volume.ops->close(i_volume.ctx);
  CHECK(pwrite(i_cas->fd, "rot", 3, (off_t)cas_data_off(i_cas, spot.slot)) ==
        3);
  CHECK(nbdserve_cas_verify(i_cas, i_tells, NULL, NULL) == -EUCLEAN);
  CHECK(i_told_of == 3);
  CHECK(nbdserve_cas_rm(i_cas, "v@1") == 0);
  CHECK(nbdserve_cas_rm(i_cas, "v@2") == 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 4096) == 0);
  n = 0;
  CHECK(nbdserve_cas_list(i_cas, i_removes, &n) == 0 && n == 2);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

static void *i_gc(void *unused) {
  uint64_t bytes;
  (void)unused;
  return (void *)(intptr_t)nbdserve_cas_gc(i_cas, &bytes, NULL, NULL);
}

static uint32_t i_slot(uint64_t block);

/* While gc gives space back, which may take as long as it likes, requests go
 * on, those that take slots, too. */
static void i_slowgc(void) {
  struct nbdserve_export e = {0};
  char b[4096] = {0};
  uint32_t x, busy = 0;
  pthread_t gc, other;
  void *err;
  int i;
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 8 << 20) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  for (i = 0; i < 2048; i++) {
    memcpy(b, &i, sizeof i);
    b[9] = 1;
    CHECK(e.ops->write(e.ctx, b, (uint64_t)i * 4096, 4096, 0) == 0);
  }
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  fi_calls(FALLOCATE, 1);
  t_hold(&fi[FALLOCATE].hold, 1);
  CHECK(pthread_create(&gc, NULL, i_gc, NULL) == 0);
  usleep(200000);
  CHECK(pthread_create(&other, NULL, i_gc, NULL) == 0); /* takes its turn */
  usleep(100000);
  CHECK(i_cas_write('a') == 0 && i_cas_has('a'));
  CHECK(fi_calls(FALLOCATE, 0) == 0);
  /* What is being given back stays as it is, whatever others find out. */
  os_lock(&i_cas->lock);
  for (x = 0, i = 0; x < i_cas->nslots; x += CAS_SEGMENT)
    if (cas_segment(i_cas, x)->space == SPACE_BUSY) busy = x, i++;
  CHECK(i == 1 && cas_punch(i_cas, busy, 1) == 0 && i_cas->gives_back);
  os_unlock(&i_cas->lock);
  cas_pass_over(i_cas, busy, -ENOSPC);
  cas_pass_over(i_cas, busy, -EIO);
  CHECK(cas_segment(i_cas, busy)->space == SPACE_BUSY);
  /* Nothing is taken from it, though the last slot was. */
  os_lock(&i_cas->lock);
  for (x = busy; CAS_AT(i_cas, x, refs);)
    x++;
  i_cas->data_cursor = x;
  os_unlock(&i_cas->lock);
  CHECK(i_cas_write('c') == 0 && i_slot(0) / CAS_SEGMENT != busy / CAS_SEGMENT);
  t_hold(&fi[FALLOCATE].hold, 0);
  CHECK(pthread_join(gc, &err) == 0);
  CHECK(err == NULL && fi_calls(FALLOCATE, 0) > 0);
  CHECK(pthread_join(other, &err) == 0 && err == NULL);
  CHECK(i_cas_write('b') == 0 && i_cas_close() == 0);
}

enum {
  I_LEAF = 1016 /* blocks below a leaf */
};

/* Where things are in a store with the default log, in its first group */
static off_t i_slot_at(uint32_t slot) {
  return (19 << 20) + (off_t)slot * 4096;
}

static off_t i_digest_at(uint32_t slot) {
  return (18 << 20) + (off_t)slot * 32;
}

/* A new store, open, with a volume v of so many leaves; mib: on a block device
 * of that size, or 0 */
static void i_new(uint64_t leaves, int mib) {
  unlink(path);
  fi_device = mib > 0;
  if (mib) close(open(path, O_RDWR | O_CREAT));
  if (mib) CHECK(truncate(path, (off_t)mib << 20) == 0);
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  i_blocks = fi_blocks;
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", leaves * I_LEAF * 4096) == 0);
  memset(&i_volume, 0, sizeof i_volume);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
}

/* A volume of the open store */
static const struct cas_volume *i_find(const char *name) {
  const struct cas_volume *vol;
  os_lock(&i_cas->lock);
  vol = cas_find(i_cas, name, strlen(name), VIEW_NOW);
  cas_unlock(i_cas);
  CHECK(vol != NULL);
  return vol;
}

/* The node of a level that leads to a block of v */
static struct cas_node *i_node(uint64_t block, int level) {
  struct cas_node *node = *cas_root(i_find("v"));
  uint64_t size = (uint64_t)I_LEAF * I_LEAF * I_LEAF; /* below a kid */
  for (; node->level > level; size /= I_LEAF)
    node = cas_kid(node, block / size % I_LEAF);
  return node;
}

/* The slot of a block of v */
static uint32_t i_slot(uint64_t block) {
  return i_node(block, 0)->slots[block % I_LEAF];
}

/* The slot of the page of a level that leads to a block of v in a store that is
 * closed */
static uint32_t i_page(uint64_t block, int level) {
  uint32_t slot;
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0);
  slot = i_node(block, level)->slot;
  CHECK(i_cas_close() == 0);
  return slot;
}

static void i_lose(uint32_t page) {
  i_flip(i_slot_at(page) + 200);
  i_flip(i_slot_at(page + CAS_TWIN) + 200);
}

/* Makes something in both copies of a page that, and the sums right again. */
static void i_forge(uint32_t slot, size_t at, const void *p, size_t len) {
  unsigned char page[4096], sum[32];
  int i;
  i_peek(i_slot_at(slot), page, sizeof page);
  memcpy(page + at, p, len);
  cas_sum_page(0, page, sizeof page, sum);
  for (i = 0; i < 2; i++, slot += CAS_TWIN) {
    i_poke(i_slot_at(slot), page, sizeof page);
    i_poke(i_digest_at(slot), sum, sizeof sum);
  }
}

static int i_name(void *arg, const struct nbdserve_cas_info *info) {
  char *all = arg;
  if (!*all) CHECK(nbdserve_cas_create(i_cas, "new", 5) == 0);
  snprintf(all + strlen(all), 60 - strlen(all), "%s ", info->name);
  return 0;
}

/* Removes what it is told of, and what would come next. */
static int i_remove_two(void *arg, const struct nbdserve_cas_info *info) {
  snprintf((char *)arg + strlen(arg), 30, "%s ", info->name);
  if (*info->name != 'a') return 0;
  CHECK(nbdserve_cas_rm(i_cas, "a") == 0);
  CHECK(nbdserve_cas_rm(i_cas, "b") == 0);
  return 0;
}

static void i_listed(void) {
  char all[60] = "";
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 5) == 0);
  CHECK(nbdserve_cas_list(i_cas, i_name, all) == 0);
  CHECK(!strcmp(all, "v w new "));
  *all = '\0';
  CHECK(nbdserve_cas_create(i_cas, "a", 5) == 0);
  CHECK(nbdserve_cas_create(i_cas, "b", 5) == 0);
  CHECK(nbdserve_cas_create(i_cas, "c", 5) == 0);
  CHECK(nbdserve_cas_list(i_cas, i_remove_two, all) == 0);
  CHECK(!strcmp(all, "v w new a c "));
  CHECK(i_cas_close() == 0);
}

static void i_dryrun(void) {
  const struct nbdserve_cas_op mixed[] = {
      {NBDSERVE_CAS_RM | NBDSERVE_CAS_DRY_RUN, "v@s", NULL, 0},
      {NBDSERVE_CAS_RM, "v@s", NULL, 0}};
  const struct nbdserve_cas_op sizes[] = {{NBDSERVE_CAS_RESIZE, "v", NULL, 5},
                                          {NBDSERVE_CAS_RM, "v@s", NULL, 0}};
  int dry = NBDSERVE_CAS_RESIZE | NBDSERVE_CAS_DRY_RUN;
  struct nbdserve_export e = {0};
  size_t failed;
  char id[72];
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  CHECK(nbdserve_cas_change(i_cas, dry, "v", NULL, 5) == -EBUSY);
  CHECK(nbdserve_cas_resize(i_cas, "v", 5) == -EBUSY);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_change(i_cas, dry, "v", NULL, 5) == 0);
  CHECK(i_find("v")->now.size == I_LEAF * 4096);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL) == 0);
  dry = NBDSERVE_CAS_RM | NBDSERVE_CAS_DRY_RUN;
  os_lock(&i_cas->lock);
  i_cas->yielded_ms = 0;
  os_unlock(&i_cas->lock);
  CHECK(nbdserve_cas_change(i_cas, dry, "v@s", NULL, 0) == 0);
  /* Others have had the lock: there may be thousands to remove. */
  CHECK(i_cas->yielded_ms || NBDSERVE_NO_THREADS);
  CHECK(*cas_digests(i_find("v@s")));
  CHECK(nbdserve_cas_changes(i_cas, mixed, 2, &failed) == -EINVAL);
  CHECK(nbdserve_cas_changes(i_cas, sizes, 2, &failed) == -EINVAL);
  CHECK(nbdserve_cas_begin(i_cas, "b", UINT64_MAX, &e) == -EINVAL);
  CHECK(nbdserve_cas_resize(i_cas, "v", 5) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

/* Only the first slot of the last segment has to be there: what is free can be
 * behind the end, and is written there. */
static void i_cutshort(void) {
  struct stat st;
  int i;
  i_new(1, 0);
  CHECK(i_put(0, 1) == 0 && i_cas_close() == 0);
  CHECK(stat(path, &st) == 0 && truncate(path, st.st_size - 4096) == 0);
  CHECK(i_cas_open(0) == 0 && i_get(0) == 1);
  for (i = 1; i < I_LEAF; i++)
    CHECK(i_put((uint64_t)i, i + 1) == 0);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  for (i = 0; i < I_LEAF; i++)
    CHECK(i_get((uint64_t)i) == i + 1);
  CHECK(i_cas_close() == 0);
}

static char i_told[200]; /* what is damaged */

static int i_tell(void *arg, const char *name, uint64_t off, uint64_t len,
                  const char *why) {
  size_t n = strlen(i_told);
  (void)arg;
  snprintf(i_told + n, sizeof i_told - n, "%s %lu %lu %s;", name,
           (unsigned long)off, (unsigned long)len, why);
  return 0;
}

static int i_verify(void) {
  i_told[0] = 0;
  return nbdserve_cas_verify(i_cas, i_tell, NULL, NULL);
}

/* Where things lie rises from group to group, as far as a store may grow. */
static void i_offsets(void) {
  static struct nbdserve_cas st;
  uint64_t off;
  uint32_t g, first;
  for (st.bs = 4096; st.bs <= 65536; st.bs *= 2) {
    st.data_off = off = 18 << 20;
    for (g = 0; g < CAS_GROUPS; g++, off += CAS_UNIT) {
      first = g * CAS_SLOTS;
      CHECK(cas_digest_off(&st, first) == off);
      CHECK(cas_digest_off(&st, first + 7) == off + 7 * 32);
      off += CAS_UNIT;
      CHECK(cas_data_off(&st, first + 7) == off + 7 * st.bs);
      off += (uint64_t)CAS_SLOTS * st.bs - CAS_UNIT;
    }
    st.nslots = (uint32_t)CAS_GROUPS * CAS_SLOTS; /* all that there may be */
    CHECK(cas_give_space(&st, st.nslots) == -ENOSPC);
  }
}

/* What a store finds when it is opened may be on its way to the medium only:
 * it syncs before it writes over the other superblock. */
static void i_underway(void) {
  char is[2];
  int n;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  i_flip(100);
  i_peek(100, is, 1);
  fi[SYNC].err = EIO;
  fi[SYNC].times = 1;
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == -EIO && !fi[SYNC].times);
  i_peek(100, is + 1, 1);
  CHECK(is[0] == is[1]);
  CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
  i_peek(100, is + 1, 1);
  CHECK(is[0] != is[1]);
  /* Nor does it go on if a sync fails, for whatever reason. */
  for (n = 0; n < 3; n++) {
    fi[SYNC].err = ENOSPC;
    fi[SYNC].skip = n;
    fi[SYNC].times = 1;
    CHECK(nbdserve_cas_open(path, NULL, &i_cas) == -ENOSPC && !fi[SYNC].times);
  }
}

static void *i_look_up(void *ended) {
  struct nbdserve_export e = {0};
  CHECK(nbdserve_cas_volume(i_cas, "v", &e) == -ENOENT);
  t_hold(ended, 1);
  return NULL;
}

static void *i_rename(void *unused) {
  (void)unused;
  return (void *)(intptr_t)nbdserve_cas_rename(i_cas, "v", "x");
}

/* Who waits for a volume that is being renamed learns of the end, also if the
 * lock was let go after the last sync, as so much was to be freed. */
static void i_woken(void) {
  struct nbdserve_export e = {0};
  int b[1024] = {0}, i, ended = 0;
  pthread_t rename, look_up;
  void *err;
  i_new(1, 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_create(i_cas, "w", 20 << 20) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  for (i = 0; i < CAS_LOOK + 200; i++) {
    b[0] = i + 1;
    CHECK(e.ops->write(e.ctx, b, (uint64_t)i * sizeof b, sizeof b, 0) == 0);
  }
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  os_lock(&i_cas->lock);
  while (i_cas->busy)
    cas_wait(i_cas);
  CHECK(i_cas->nwaiting > CAS_LOOK);
  cas_unlock(i_cas);
  t_hold(&fi[SYNC].hold, 1);
  CHECK(pthread_create(&rename, NULL, i_rename, NULL) == 0);
  usleep(100000);
  CHECK(pthread_create(&look_up, NULL, i_look_up, &ended) == 0);
  usleep(100000);
  t_hold(&fi_yields, 1);
  t_hold(&fi[SYNC].hold, 0);
  CHECK(pthread_join(rename, &err) == 0 && !err);
  t_hold(&fi_yields, 0);
  for (i = 0; i < 1000 && !t_hold(&ended, -1); i++)
    usleep(10000);
  CHECK(i < 1000 && pthread_join(look_up, NULL) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

static void *i_use(void *e) {
  struct nbdserve_export *export = e;
  while (nbdserve_cas_volume(i_cas, "new", export))
    usleep(100);
  return NULL;
}

/* Who wants a volume that is being filled may have it as soon as it is there,
 * while whoever fills it is not yet done. */
static void i_seen(void) {
  struct nbdserve_export mine = {0}, other = {0};
  pthread_t use;
  i_new(1, 0);
  CHECK(nbdserve_cas_begin(i_cas, "new", 4096, &mine) == 0);
  CHECK(pthread_create(&use, NULL, i_use, &other) == 0);
  usleep(10000);
  t_hold(&fi_yields, 1);
  CHECK(nbdserve_cas_finish(i_cas, &mine, 1) == 0);
  t_hold(&fi_yields, 0);
  CHECK(pthread_join(use, NULL) == 0 && other.size == 4096);
  other.ops->close(other.ctx);
  CHECK(i_cas_close() == 0);
}

static int i_bounded(void *most, uint64_t done, uint64_t total) {
  CHECK(done <= total);
  if (done > *(uint64_t *)most) *(uint64_t *)most = done;
  return 0;
}

/* What snapshots share is counted once for each, and not beyond their end. */
static void i_bounded_all(void) {
  uint64_t most = 0;
  i_new(8, 0);
  CHECK(i_put(0, 1) == 0 && i_put(I_LEAF, 2) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@a") == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@b") == 0);
  CHECK(nbdserve_cas_verify(i_cas, NULL, i_bounded, &most) == 0);
  CHECK(most == 3 * 8 * (uint64_t)I_LEAF * 4096);
  CHECK(i_cas_close() == 0);
}

static void *i_flush_often(void *number) {
  int i, first = (int)(intptr_t)number * 100;
  for (i = 0; i < 30; i++) {
    CHECK(i_put((uint64_t)(first + i), first + i) == 0);
    int before = fi_calls(SYNC, 0);
    CHECK(i_volume.ops->flush(i_volume.ctx, 0) == 0);
    CHECK(fi_calls(SYNC, 0) - before <= 10); /* 2, but we may be interrupted */
  }
  return NULL;
}

/* Whoever flushes a store waits for the sync that runs and for the next one,
 * however many others flush at the same time. */
static void i_flush_storm(void) {
  pthread_t t[4];
  int i;
  i_new(1, 0);
  fi_sync_us = 3000;
  for (i = 0; i < COUNT(t); i++)
    CHECK(pthread_create(t + i, NULL, i_flush_often, (void *)(intptr_t)i) == 0);
  for (i = 0; i < COUNT(t); i++)
    CHECK(pthread_join(t[i], NULL) == 0);
  fi_sync_us = 0;
  CHECK(i_cas_close() == 0);
}

/* A medium that refuses all writes, but not the space for them: a change fails
 * after a few tries, which take a few segments, and can be made again later. */
static void i_given_up(void) {
  struct stat before, after;
  i_new(1, 0);
  CHECK(i_volume.ops->flush(i_volume.ctx, 0) == 0);
  CHECK(stat(path, &before) == 0);
  fi[PWRITE].err = EIO;
  fi[PWRITE].times = -1;
  CHECK(nbdserve_cas_create(i_cas, "w", 4096) == -EIO);
  fi[PWRITE].times = 0;
  CHECK(stat(path, &after) == 0);
  CHECK(after.st_size - before.st_size < 64 << 20);
  CHECK(nbdserve_cas_create(i_cas, "w", 4096) == 0);
  CHECK(i_cas_close() == 0);
}

static void *i_remove_v(void *unused) {
  (void)unused;
  return (void *)(intptr_t)nbdserve_cas_rm(i_cas, "w");
}

/* Nobody gets the name of a volume that is about to go: it may stay. */
static void i_going(void) {
  struct nbdserve_export mine = {0};
  pthread_t rm;
  void *err;
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 4096) == 0);
  t_hold(&fi[SYNC].hold, 1);
  CHECK(pthread_create(&rm, NULL, i_remove_v, NULL) == 0);
  usleep(100000);
  CHECK(nbdserve_cas_begin(i_cas, "w", 4096, &mine) == -EEXIST);
  t_hold(&fi[SYNC].hold, 0);
  CHECK(pthread_join(rm, &err) == 0 && !err);
  CHECK(nbdserve_cas_begin(i_cas, "w", 4096, &mine) == 0);
  CHECK(nbdserve_cas_finish(i_cas, &mine, 1) == 0);
  CHECK(i_cas_close() == 0);
}

/* A sealed snapshot whose volume's record is lost can be written from then on:
 * it is not found by its id any more, nor does anything get that id. */
static void i_orphan(void) {
  struct nbdserve_export e = {0};
  char id[72], other[72];
  i_new(1, 0);
  CHECK(i_put(0, 1) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL) == 0);
  os_lock(&i_cas->lock);
  struct cas_volume *vol = cas_find(i_cas, "v@s", 3, VIEW_NOW);
  vol->now.made_from = vol->then.made_from = 999999;
  CHECK(cas_own_record(i_cas, vol->place, &vol->page) == 0);
  cas_unlock(i_cas);
  CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  i_volume.ops->close(i_volume.ctx);
  i_volume.ctx = NULL;
  CHECK(nbdserve_cas_close(i_cas) == 0);
  struct nbdserve_cas_options o = {.flags = NBDSERVE_CAS_ACCEPT_LOSS};
  CHECK(nbdserve_cas_open(path, &o, &i_cas) == 0);
  CHECK(nbdserve_cas_volume(i_cas, id, &e) == -ENOENT);
  CHECK(nbdserve_cas_volume(i_cas, "s", &e) == 0);
  CHECK(e.ops->write(e.ctx, "two", 0, 4, 0) == 0);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_snapshot(i_cas, "s@n") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "s@n", other, NULL, NULL) == 0);
  CHECK(strcmp(id, other) != 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

/* A damaged block is not read as sound because its data is in memory and its
 * digest is not; nor because the rest of the request is sound. */
static void i_away(void) {
  static unsigned char b[257 * 4096];
  struct nbdserve_req r = {0};
  int i;
  i_new(1, 0);
  for (i = 0; i < 257; i++)
    CHECK(i_put((uint64_t)i, i + 1) == 0);
  i = (int)i_slot(0);
  CHECK(i_cas_close() == 0);
  i_flip(i_slot_at((uint32_t)i) + 70);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  r.type = NBD_CMD_READ;
  r.len = 4096;
  r.buf = b;
  fi_away = 18 << 20;
  fi_away_end = 19 << 20;
  cas_batch(i_volume.ctx, &r, 1);
  CHECK(r.err == (i_cas->can_read_now ? -EAGAIN : -EIO));
  /* Nor is a sound one damaged whose data is there in a run that is not, while
   * its digest is not in memory. */
  CHECK(i_slot(2) == i_slot(1) + 1);
  r.off = 4096;
  r.len = 2 * 4096;
  fi_away = i_digest_at(i_slot(1));
  fi_away_end = fi_away + 64;
  fi_also_away = i_slot_at(i_slot(1)) + 100;
  cas_batch(i_volume.ctx, &r, 1);
  CHECK(r.err == (i_cas->can_read_now ? -EAGAIN : 0));
  r.off = 0;
  r.len = 4096;
  fi_away = fi_away_end = fi_also_away = 0;
  cas_batch(i_volume.ctx, &r, 1);
  r.may_wait = 1;
  if (r.err == -EAGAIN) cas_batch(i_volume.ctx, &r, 1);
  CHECK(r.err == -EIO);
  CHECK(i_volume.ops->read(i_volume.ctx, b, 50, 8142, 0) == -EIO);
  CHECK(i_volume.ops->read(i_volume.ctx, b, 0, sizeof b, 0) == -EIO);
  CHECK(i_volume.ops->read(i_volume.ctx, b, 4096, 8192, 0) == 0);
  CHECK(i_cas_close() == 0);
}

/* A file system that is full, and copies what is written over: the superblock
 * cannot be written again, but it is there, and what is logged follows it. */
static void i_nowhere(void) {
  int status;
  pid_t pid;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  fi[PWRITE].err = ENOSPC;
  fi[PWRITE].times = 1;
  CHECK(i_cas_open(0) == 0 && fi[PWRITE].times == 0);
  CHECK(i_get(0) == 'a' && i_put(1, 'b') == 0 && i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    fi[PWRITE].times = 1;
    CHECK(i_cas_open(0) == 0 && i_put(2, 'c') == 0 && i_flush() == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  CHECK(i_cas_open(0) == 0 && i_get(2) == 'c' && i_cas_close() == 0);
}

/* A store with the same data in two slots, of blocks 0 and 1; closed */
static void i_new_twice(uint32_t slot[2]) {
  int i;
  i_new(1, 0);
  for (i = 0; i < 2; i++) {
    CHECK(i_put((uint64_t)i, 'a') == 0);
    slot[i] = i_slot((uint64_t)i);
    os_lock(&i_cas->lock);
    cas_unindex(i_cas, slot[i]);
    cas_unlock(i_cas);
  }
  CHECK(slot[0] != slot[1] && i_cas_close() == 0);
}

/* The same data in two slots, of which the index finds one first */
static void i_twice(void) {
  struct nbdserve_export e = {0};
  uint32_t slot[2];
  int i;
  i_new_twice(slot);
  for (i = 0; i < 2; i++) {
    i_flip(i_slot_at(slot[i]) + 7);
    CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
    CHECK(nbdserve_cas_begin(i_cas, "x", 1, &e) == 0); /* the index is full */
    CHECK(nbdserve_cas_finish(i_cas, &e, 0) == 0);
    CHECK(nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL) == 0 &&
          !*i_told);
    CHECK(i_get(0) == 'a' && i_get(1) == 'a' && i_cas_close() == 0);
  }
}

/* Nothing is written until it is opened anew, and nothing is lost. */
static void i_stopped(void) {
  CHECK(i_put(2, 'x') == -EIO && i_put(0, 'x') == -EIO && i_flush() == -EIO);
  CHECK(nbdserve_cas_create(i_cas, "x", 5) == -EIO);
  CHECK(nbdserve_cas_resize(i_cas, "v", 5) == -EIO);
  CHECK(i_cas_close() == -EIO);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0 && i_get(0) == 'a');
  CHECK(nbdserve_cas_rm(i_cas, "x") == -ENOENT);
}

/* After a failed sync memory may have what was not written, or what was there
 * before: then it is read and found wrong, though it was right before.  And
 * after one failed write of the log or a superblock nothing follows it. */
static void i_failed(void) {
  static const char was[4096];
  off_t bad[3] = {0, 1, (1 << 20) + 1};
  int i, err;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  CHECK(i_put(0, 'b') == 0);
  fi[SYNC].err = EIO;
  fi[SYNC].times = 1;
  CHECK(i_flush() == -EIO && i_get(0) == 'b');
  i_poke(i_slot_at(i_slot(0)), was, sizeof was);
  CHECK(i_get(0) == -EIO);
  i_stopped();
  fi[PWRITE].once = 1;
  for (i = 0; i < 3; i++) { /* the log, and both superblocks */
    CHECK(i_cas_close() == 0);
    CHECK(i_cas_open(0) == 0); /* which writes a superblock, too */
    fi[PWRITE].bad = i ? bad[i] : i_log_place();
    err = i ? nbdserve_cas_create(i_cas, "w", 5) : i_put(1, 'c');
    CHECK(err == -EIO && !fi[PWRITE].bad);
    i_stopped();
  }
  CHECK(i_cas_close() == 0);
}

/* Even one entry, in the page where the log begins; but nothing has to be done
 * if there is none. */
static void i_closing(void) {
  int calls, i;
  i_new(1, 0);
  CHECK(i_cas_close() == 0);
  for (i = 1; i < 4; i++) {
    CHECK(i_cas_open(0) == 0);
    if (i < 3) CHECK(i_put(0, i) == 0);
    calls = fi[SYNC].calls;
    CHECK(i_cas_close() == 0 && (fi[SYNC].calls > calls) == (i < 3));
  }
  CHECK(i_cas_open(0) == 0 && i_get(0) == 2 && i_cas_close() == 0);
}

static void i_manylost(void) {
  uint32_t page[10];
  uint64_t i, n;
  for (n = CAS_MAX_LOST; n <= CAS_MAX_LOST + 1; n++) {
    i_new(10, 0);
    for (i = 0; i < 10; i++)
      CHECK(i_put(i * I_LEAF, 'a') == 0);
    CHECK(i_cas_close() == 0);
    for (i = 0; i < 10; i++)
      page[i] = i_page(i * I_LEAF, 0);
    for (i = 0; i < n; i++)
      i_lose(page[i]);
    if (n > CAS_MAX_LOST) {
      CHECK(i_cas_open(0) == -EUCLEAN);
      CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == -EUCLEAN);
      CHECK(i_cas_open(NBDSERVE_CAS_ACCEPT_LOSS) == 0 && i_cas_close() == 0);
    }
    CHECK(i_cas_open(0) == 0);
    for (i = 0; i < 10; i++)
      CHECK(i_get(i * I_LEAF) == (i < n ? -EIO : 'a'));
    CHECK(i_cas_close() == 0);
  }
}

static int i_range(void *arg, uint64_t off, uint64_t len) {
  uint64_t *sum = arg;
  CHECK(len > 0 && off + len <= 2 * I_LEAF * 4096);
  *sum += len;
  return 0;
}

/* A leaf, then upper pages, which a volume shares with a snapshot and a clone;
 * but those above the leaf it has of its own. */
static void i_lostpage(void) {
  const uint64_t leaf = I_LEAF * 4096;
  int level, other;
  for (level = 0; level < CAS_LEVELS; level++) {
    uint64_t sum = 0;
    char id[72];
    i_new(2, 0);
    CHECK(i_put(0, 'a') == 0 && i_put(I_LEAF, 'b') == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
    CHECK(nbdserve_cas_clone(i_cas, "v@s", "c") == 0);
    if (!level) CHECK(i_put(I_LEAF + 1, 'b') == 0);
    CHECK(i_cas_close() == 0);
    i_lose(i_page(0, level));
    CHECK(i_cas_open(0) == 0);
    other = level ? -EIO : 'b';
    CHECK(i_get(0) == -EIO && i_get(1) == -EIO && i_get(I_LEAF) == other);
    CHECK(nbdserve_cas_diff(i_cas, "v", "c", i_range, &sum) == 0);
    if (!level) CHECK(sum == leaf + 4096);
    CHECK(nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL) == -EIO && !*id);
    CHECK(i_put(1, 'x') == 0);
    for (int again = 0; again < 2; again++) {
      CHECK(i_get(0) == -EIO && i_get(1) == 'x' && i_get(I_LEAF) == other);
      CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
    }
    CHECK(i_cas_close() == 0);
  }
}

/* A volume of which an upper page is lost is no more sound, and no more like an
 * empty one, than if a leaf were, also if the empty one comes first. */
static void i_nohole(void) {
  const uint64_t leaf = I_LEAF * 4096;
  int level;
  for (level = 0; level < CAS_LEVELS; level++) {
    uint64_t sum = 0;
    i_new(2, 0);
    i_volume.ops->close(i_volume.ctx);
    CHECK(nbdserve_cas_rename(i_cas, "v", "empty") == 0);
    CHECK(nbdserve_cas_create(i_cas, "v", 2 * leaf) == 0);
    CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    i_lose(i_page(0, level));
    CHECK(i_cas_open(0) == 0 && i_get(0) == -EIO);
    CHECK(i_verify() == -EUCLEAN && !strncmp(i_told, "v 0 ", 4));
    CHECK(nbdserve_cas_diff(i_cas, "empty", "v", i_range, &sum) == 0);
    CHECK(sum == (level ? 2 * leaf : leaf));
    CHECK(i_cas_close() == 0);
  }
}

static void i_reread(void) {
  struct cas_node *leaf;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0 && i_cas_open(0) == 0);
  leaf = i_node(0, 0);
  os_lock(&i_cas->lock);
  cas_forget_leaf(i_cas, leaf);
  cas_unlock(i_cas);
  fi[PREAD].err = EIO;
  fi[PREAD].times = -1;
  CHECK(i_get(0) == -EIO && i_put(0, 'b') == -EIO);
  fi[PREAD].times = 0;
  CHECK(i_get(0) == 'a' && CAS_AT(i_cas, leaf->slot, refs) == 1);
  CHECK(i_put(0, 'b') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(0) == 'b' && i_cas_close() == 0);
}

/* Who cannot read a digest has the data all the same. */
static void i_nodigest(void) {
  unsigned char sum[32], digest[32] = "another one";
  off_t at;
  i_new(1, 0);
  CHECK(i_put(1, 'a') == 0);
  at = i_digest_at(i_slot(1));
  CHECK(i_cas_close() == 0);
  i_peek(at, sum, sizeof sum);
  i_poke(at, digest, sizeof digest);
  fi[PREAD].bad = at + 5;
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0 && i_get(1) == 'a');
  CHECK(i_verify() == -EUCLEAN);
  CHECK(!strcmp(i_told, "v 4096 4096 the digest cannot be read;"));
  CHECK(nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL) == 0);
  CHECK(i_cas_close() == 0);
  fi[PREAD].bad = 0;
  i_peek(at, digest, sizeof digest);
  CHECK(!memcmp(sum, digest, sizeof sum));
}

/* A process of its own, which is killed when it has done that much: writes
 * block 1, makes a volume, writes block 2, and flushes */
static void i_killed(int steps) {
  int status;
  pid_t pid = fork();
  CHECK(pid >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0 && i_put(1, 'b') == 0);
    if (steps > 1) CHECK(nbdserve_cas_create(i_cas, "w", 5) == 0);
    if (steps > 2) CHECK(i_put(2, 'c') == 0 && i_flush() == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

/* What was written before a kill, and cannot be read when the store is opened,
 * is not taken back to what was there before: who reads it gets an error, and
 * when it can be read again it is there. */
static void i_unread(void) {
  uint32_t slot;
  i_new(1, 0);
  CHECK(i_put(1, 'a') == 0 && i_cas_close() == 0);
  i_killed(1);
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0 && i_get(1) == 'b');
  slot = i_slot(1);
  CHECK(i_cas_close() == 0);
  fi[PREAD].bad = i_slot_at(slot) + 5;
  CHECK(i_cas_open(0) == 0 && i_get(1) == -EIO);
  CHECK(cas_segment(i_cas, slot)->space != SPACE_BROKEN && i_cas_close() == 0);
  fi[PREAD].bad = 0;
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'b' && i_cas_close() == 0);
}

/* The digest of what was written before a kill is in a bad sector, which heals
 * only if it is written as a whole: then it has the digests of all that lies
 * there, or they would be as old as it is when it can be read again. */
static void i_sector(void) {
  uint32_t slot;
  int status, i;
  pid_t pid;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0);
    for (i = 0; i < 50; i++)
      CHECK(i_put((uint64_t)i, i + 1000) == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0);
  slot = i_slot(20);
  CHECK(slot % 128 && i_cas_close() == 0);
  fi[PREAD].bad = fi[PWRITE].bad = i_digest_at(slot) + 1;
  fi[PWRITE].err = EIO;
  fi[PWRITE].heals = 1;
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0 && !fi[PREAD].bad);
  for (i = 0; i < 50; i++)
    CHECK(i_get((uint64_t)i) == i + 1000);
  CHECK(i_verify() == 0 && i_cas_close() == 0);
}

/* After a write has failed nothing is taken from that segment, and who wrote
 * notices nothing. */
static void i_passed(void) {
  uint32_t slot;
  uint64_t i;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  slot = i_slot(0);
  fi[PWRITE].bad = i_slot_at(slot + 1) + 1;
  for (i = 1; i < 5; i++) {
    CHECK(i_put(i, 'a' + (int)i) == 0);
    CHECK(i_slot(i) / CAS_SEGMENT != slot / CAS_SEGMENT);
  }
  CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0); /* frees some, but: */
  CHECK(cas_segment(i_cas, slot)->space == SPACE_BROKEN);
  os_lock(&i_cas->lock); /* if the last one is broken, what comes is not */
  cas_adjust(i_cas, i_cas->nslots - 1, SPACE_BROKEN, 0, 0);
  CHECK(cas_give_space(i_cas, i_cas->nslots) == 0);
  CHECK(cas_segment(i_cas, i_cas->nslots - 1)->space == SPACE_WRITTEN);
  cas_unlock(i_cas);
  CHECK(i_flush() == 0 && i_cas_close() == 0 && i_cas_open(0) == 0);
  for (i = 0; i < 5; i++)
    CHECK(i_get(i) == 'a' + (int)i);
  CHECK(i_cas_close() == 0);
}

/* So many segments that are known to have space say that they were given
 * back. */
static int i_count_given(void) {
  uint32_t x;
  int n = 0;
  os_lock(&i_cas->lock);
  for (x = 0; x < i_cas->nslots; x += CAS_SEGMENT)
    n += cas_segment(i_cas, x)->space == SPACE_DURABLE &&
         (cas_segment(i_cas, x)->is_given || cas_given_back(i_cas, x));
  os_unlock(&i_cas->lock);
  return n;
}

/* Segments that were given back, and of which recovery has taken the space
 * again, are like any others after a sync: else, if the disk is full then, the
 * next one would take them for such as have none. */
static void i_regained(void) {
  unsigned char given[CAS_DIGEST_LEN];
  uint32_t x;
  memset(given, 255, sizeof given);
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_flush() == 0);
  os_lock(&i_cas->lock); /* as after a cut, which has brought that back: */
  for (x = 1; x < CAS_SEGMENT; x++)
    if (!CAS_AT(i_cas, x, refs)) i_poke(i_digest_at(x), given, sizeof given);
  CHECK(cas_segment(i_cas, 0)->space == SPACE_DURABLE);
  cas_segment(i_cas, 0)->is_given = 1;
  CHECK(cas_give_space(i_cas, i_cas->nslots) == 0); /* it waits for the sync */
  cas_unlock(i_cas);
  CHECK(i_count_given() == 1);
  CHECK(i_put(1, 'b') == 0 && i_flush() == 0);
  CHECK(i_count_given() == 0 && i_verify() == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0 && i_verify() == 0);
  CHECK(i_get(0) == 'a' && i_get(1) == 'b' && i_cas_close() == 0);
}

/* A disk has lost one copy of a page together with its digest: what was there
 * before fits by itself, too, but it is older. */
static void i_newest(void) {
  unsigned char page[4096], sum[32];
  uint32_t slot, copy;
  for (copy = 0; copy < 2; copy++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(i_slot_at(slot), page, sizeof page);
    u_put32(page + CAS_HEAD, 0); /* when block 0 was a hole */
    u_put64(page + 12, u_get64(page + 12) - 1);
    cas_sum_page(0, page, sizeof page, sum);
    i_poke(i_slot_at(slot + copy * CAS_TWIN), page, sizeof page);
    i_poke(i_digest_at(slot + copy * CAS_TWIN), sum, sizeof sum);
    CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
  }
}

/* A block that is where a page is, or behind the end of the file, is lost, and
 * from then on the leaf says so: what comes there later is not its own. */
static void i_named(void) {
  unsigned char b[4];
  uint32_t slot, behind;
  for (behind = 0; behind < 2; behind++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_put(5, 'b') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    u_put32(b, behind ? 100000 : slot);
    i_forge(slot, CAS_HEAD + 4 * 5, b, sizeof b);
    CHECK(i_cas_open(0) == 0 && i_get(5) == -EIO && i_get(0) == 'a');
    CHECK(i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(i_slot_at(slot) + CAS_HEAD + 4 * 5, b, sizeof b);
    CHECK(u_get32(b) == CAS_LOST && i_cas_open(0) == 0 && i_get(5) == -EIO);
    CHECK(i_verify() == -EUCLEAN);
    CHECK(!strcmp(i_told, "v 20480 4096 the map cannot be read;"));
    CHECK(i_put(5, 'c') == 0 && i_get(5) == 'c' && i_cas_close() == 0);
  }
}

/* Each allocation of a seal fails in turn, then each of its writes: nothing is
 * left of what it had begun, and in the end it is sealed. */
static void i_unsealed(void) {
  int n, err = 1, what, done = 0, failed = 0;
  char id[72];
  for (what = 0; what < 2; what++) {
    i_new(2, 0);
    CHECK(i_put(0, 'a') == 0 && i_put(I_LEAF, 'b') == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
    for (n = 1, done = failed = 0; !done; n++) {
      CHECK(n < 200);
      fi[MALLOC].calls = fi[PWRITE].calls = 0;
      if (!what) fi[MALLOC].bad = n;
      fi[PWRITE].err = ENOSPC;
      fi[PWRITE].skip = n - 1;
      fi[PWRITE].times = what;
      err = nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL);
      done = fi[what ? PWRITE : MALLOC].calls < n || !err;
      fi[MALLOC].bad = fi[PWRITE].times = fi[PWRITE].skip = 0;
      CHECK(!err == !!*id);
      cas_check(i_cas, 0);
      failed += err != 0;
      if (err == -EIO) break; /* of the log, or a superblock */
    }
    CHECK(what || (!err && failed > 5));
    i_volume.ops->close(i_volume.ctx);
    CHECK(nbdserve_cas_close(i_cas) == (err == -EIO ? -EIO : 0));
    CHECK(fi_blocks == i_blocks);
  }
}

static uint64_t i_fill(uint64_t block);

/* On a full store there is space for a block as soon as another one is trimmed:
 * the write itself syncs, so that it is free. */
static void i_waiting(void) {
  uint64_t block;
  i_new(10, 32);
  CHECK(i_fill(0) > 1000 && i_flush() == 0);
  for (block = 10; block < 20; block++) {
    CHECK(i_volume.ops->trim(i_volume.ctx, block * 4096, 4096, 0) == 0);
    CHECK(i_put(block, (int)block + 100000) == 0);
    CHECK(i_get(block) == (int)block + 100000);
  }
  CHECK(i_cas_close() == 0);
}

/* A name is that of nothing whose name begins or ends with it. */
static void i_prefix(void) {
  static const char *const none[] = {"a",     "abc", "a@s", "ab@", "ab@st",
                                     "abc@s", "@s",  "s",   "b",   ""};
  struct nbdserve_export e = {0};
  int i;
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "ab", 5) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "ab@s") == 0);
  for (i = 0; i < COUNT(none); i++)
    CHECK(nbdserve_cas_volume(i_cas, none[i], &e) == -ENOENT);
  CHECK(nbdserve_cas_create(i_cas, "a", 5) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "a@st") == 0);
  CHECK(nbdserve_cas_rm(i_cas, "a@s") == -ENOENT);
  CHECK(nbdserve_cas_rm(i_cas, "ab@s") == 0 && i_cas_close() == 0);
}

/* Of two pages of the log in a row that are gone, the first one was durable, as
 * a later page says: that is damage.  If only the second one is gone, which was
 * not, or none but that later page, it is a torn end. */
static void i_gaps(void) {
  int status, gone, i;
  uint64_t replay;
  pid_t pid;
  for (gone = 1; gone < 8; gone++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    replay = i_replay();
    CHECK((pid = fork()) >= 0);
    if (!pid) {
      CHECK(i_cas_open(0) == 0);
      CHECK(i_put(1, 1) == 0 && i_flush() == 0);
      for (i = 2; i < 2 + CAS_ENTRIES + 1; i++) /* a page, and one more */
        CHECK(i_put((uint64_t)i, i) == 0);
      _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    for (i = 0; i < 3; i++)
      if (gone & 1 << i) i_flip(i_log_at(replay + (uint64_t)i) + 4040);
    /* The third page says that the first one is durable, and so does the
     * second. */
    if (gone & 1 && gone < 7) {
      CHECK(i_cas_open(0) == -EUCLEAN);
      continue;
    }
    CHECK(i_cas_open(0) == 0 && i_get(0) == 'a');
    CHECK(i_get(1) == (gone & 1 ? 0 : 1));
    CHECK(i_get(2) == (gone & 2 ? 0 : 2));
    CHECK(i_get(1 + CAS_ENTRIES) == (gone & 2 ? 0 : 1 + CAS_ENTRIES));
    CHECK(i_get(2 + CAS_ENTRIES) == (gone & 4 ? 0 : 2 + CAS_ENTRIES));
    CHECK(i_cas_close() == 0);
  }
}

/* A page of a checkpoint that never became durable is none, though its sums are
 * right (C17). */
static void i_future(void) {
  unsigned char b[8];
  uint64_t number;
  uint32_t slot;
  int later;
  for (later = 0; later < 2; later++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(32, b, sizeof b);
    number = u_get64(b);
    i_peek(i_slot_at(slot) + 12, b, sizeof b);
    CHECK(u_get64(b) <= number);
    u_put64(b, number + (uint64_t)later);
    i_forge(slot, 12, b, sizeof b);
    CHECK(i_cas_open(0) == 0 && i_get(0) == (later ? -EIO : 'a'));
    CHECK(i_cas_close() == 0);
  }
}

/* A slot has the same data, but its digest is wrong: what is written again goes
 * elsewhere, or it could not be read later. */
static void i_misled(void) {
  struct nbdserve_export e = {0};
  off_t at;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  at = i_digest_at(i_slot(0)) + 20; /* not where the index looks */
  CHECK(i_cas_close() == 0);
  i_flip(at);
  CHECK(i_cas_open(NBDSERVE_CAS_NO_VERIFY) == 0);
  CHECK(nbdserve_cas_begin(i_cas, "x", 1, &e) == 0); /* the index is full */
  CHECK(nbdserve_cas_finish(i_cas, &e, 0) == 0);
  CHECK(i_get(0) == 'a'); /* unchecked, and so no reason to believe it */
  CHECK(i_put(1, 'a') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  CHECK(i_get(0) == -EIO && i_get(1) == 'a' && i_cas_close() == 0);
}

/* Verify reads what was read before, too: it may have rotted since.  And what
 * it has found is not read as if it were good. */
static void i_anew(void) {
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0 && i_get(0) == 'a');
  CHECK(i_verify() == 0);
  i_flip(i_slot_at(i_slot(0)) + 9);
  CHECK(i_verify() == -EUCLEAN);
  CHECK(!strcmp(i_told, "v 0 4096 the data is not what it was;"));
  CHECK(i_get(0) == -EIO && i_put(1, 'a') == 0 && i_get(1) == 'a');
  CHECK(i_cas_close() == 0);
}

/* What two snapshots share and is damaged is named for both, and for the
 * volume. */
static void i_shared(void) {
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@1") == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@2") == 0);
  i_flip(i_slot_at(i_slot(0)) + 9);
  CHECK(i_verify() == -EUCLEAN);
  CHECK(!strcmp(i_told, "v 0 4096 the data is not what it was;"
                        "v@1 0 4096 the data is not what it was;"
                        "v@2 0 4096 the data is not what it was;"));
  CHECK(i_cas_close() == 0);
}

/* Copies of a page that differ are both written anew when it is read, whichever
 * is wrong, and so are digests. */
static void i_healed(void) {
  unsigned char page[2][4096], sum[2][32];
  uint32_t slot;
  int what, i;
  for (what = 0; what < 4; what++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(i_slot_at(slot), page[0], 4096);
    i_peek(i_digest_at(slot), sum[0], 32);
    i = what % 2 * (int)CAS_TWIN;
    i_flip(what < 2 ? i_slot_at(slot + (uint32_t)i) + 200
                    : i_digest_at(slot + (uint32_t)i) + 3);
    CHECK(i_cas_open(0) == 0 && i_verify() == 0);
    for (i = 0; i < 2; i++, slot += CAS_TWIN) {
      i_peek(i_slot_at(slot), page[1], 4096);
      i_peek(i_digest_at(slot), sum[1], 32);
      CHECK(!memcmp(page[0], page[1], 4096) && !memcmp(sum[0], sum[1], 32));
    }
    CHECK(i_get(0) == 'a' && i_cas_close() == 0);
  }
}

/* Changes in one see what those before them make: sizes, names, and what there
 * is below a volume; and two rollbacks of one volume are refused. */
static void i_inorder(void) {
  struct nbdserve_cas_op ops[3] = {{NBDSERVE_CAS_ROLLBACK, "v@s", NULL, 0},
                                   {NBDSERVE_CAS_CLONE, "v", "c", 0},
                                   {NBDSERVE_CAS_RENAME, "v", "w", 0}};
  struct nbdserve_cas_op twice[2] = {{NBDSERVE_CAS_ROLLBACK, "w@s", NULL, 0},
                                     {NBDSERVE_CAS_ROLLBACK, "w@s", NULL, 0}};
  struct nbdserve_cas_op made[2] = {{NBDSERVE_CAS_SNAPSHOT, "w@t", NULL, 0},
                                    {NBDSERVE_CAS_RM, "w", NULL, 0}};
  struct nbdserve_cas_op fresh[2] = {{NBDSERVE_CAS_CREATE, "x", NULL, 8192},
                                     {NBDSERVE_CAS_SNAPSHOT, "x@1", NULL, 0}};
  struct nbdserve_export e = {0};
  size_t failed = 9;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(i_put(0, 'b') == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_resize(i_cas, "v", 8192) == 0);
  CHECK(nbdserve_cas_changes(i_cas, ops, 3, &failed) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "c", &e) == 0);
  CHECK(e.size == I_LEAF * 4096);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_changes(i_cas, twice, 2, &failed) == -EINVAL);
  CHECK(failed == 1);
  CHECK(nbdserve_cas_rm(i_cas, "w@s") == 0);
  CHECK(nbdserve_cas_changes(i_cas, made, 2, &failed) == -ENOTEMPTY);
  CHECK(failed == 1 && nbdserve_cas_rm(i_cas, "w@t") == -ENOENT);
  CHECK(nbdserve_cas_changes(i_cas, fresh, 2, &failed) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &i_volume) == 0 && i_get(0) == 'a');
  CHECK(i_volume.size == I_LEAF * 4096 && i_cas_close() == 0);
}

/* A disk has lost both superblocks of the last checkpoint, but not what was
 * logged since. */
static void i_outdated(void) {
  unsigned char super[2][4096];
  int i;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  for (i = 0; i < 2; i++)
    i_peek(i << 20, super[i], sizeof super[i]);
  i_killed(3);
  for (i = 0; i < 2; i++)
    i_poke(i << 20, super[i], sizeof super[i]);
  CHECK(i_cas_open(0) == -EUCLEAN);
  CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == -EUCLEAN);
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0 && i_get(0) == 'a');
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_ACCEPT_LOSS) == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
}

/* One copy is whole, but of an earlier time, and nothing is left of the other:
 * the digests, which are newer, say so. */
static void i_oldcopy(void) {
  unsigned char page[4096], sum[32];
  uint32_t slot, i;
  for (i = 0; i < 4; i++) { /* 2, 3: a digest cannot be read */
    uint32_t copy = i % 2 * CAS_TWIN;
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(i_slot_at(slot), page, sizeof page);
    u_put32(page + CAS_HEAD, 0); /* when block 0 was a hole */
    cas_sum_page(0, page, sizeof page, sum);
    i_poke(i_slot_at(slot + copy), page, sizeof page);
    memset(page, 0, sizeof page);
    i_poke(i_slot_at(slot + (copy ^ CAS_TWIN)), page, sizeof page);
    if (i > 1) fi[PREAD].bad = i_digest_at(slot + copy);
    CHECK(i_cas_open(0) == 0 && i_get(0) == -EIO && i_cas_close() == 0);
    fi[PREAD].bad = 0;
  }
}

/* The size of a snapshot is smaller than what it has; and a volume is partial,
 * which the superblock has to say, too. */
static void i_records(void) {
  static const unsigned char size[8] = {0, 0, 0, 0, 0, 0, 16, 0};
  static const unsigned char flags[4] = {0, 0, 0, CAS_IS_PARTIAL}, none[4];
  static const unsigned char unknown[4] = {64}; /* of a later version */
  struct nbdserve_export e = {0};
  struct nbdserve_cas_stat with, without;
  uint32_t page, place[2];
  char id[72], part[80];
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_put(1, 'b') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 8192) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  CHECK(e.ops->write(e.ctx, "w", 0, 1, 0) == 0);
  e.ops->close(e.ctx);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  nbdserve_cas_stat(i_cas, &with);
  page = i_find("v")->page->slot;
  place[0] = CAS_HEAD + CAS_RECORD * i_find("v@s")->place;
  place[1] = CAS_HEAD + CAS_RECORD * i_find("w")->place;
  CHECK(i_cas_close() == 0);
  i_forge(page, place[0] + 8, size, sizeof size);
  i_forge(page, place[1] + 4, flags, sizeof flags);
  CHECK(i_cas_open(0) == -EUCLEAN); /* not a partial volume's name */
  snprintf(part, sizeof part, "sha256-%064d/partial", 0);
  i_forge(page, place[1] + 112, (const unsigned char *)part, sizeof part);
  CHECK(i_cas_open(0) == -EUCLEAN); /* the superblock knows of none */
  i_forge(page, place[1] + 4, none, sizeof none);
  memset(part, 0, sizeof part);
  part[0] = 'u';
  i_forge(page, place[1] + 112, (const unsigned char *)part, sizeof part);
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'b');
  CHECK(nbdserve_cas_rm(i_cas, "u") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL) == -EIO && !*id);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == -ENOENT);
  CHECK(nbdserve_cas_create(i_cas, "w", 5) == 0); /* the name is free, and */
  nbdserve_cas_stat(i_cas, &without);             /* a block and 4 pages */
  CHECK(without.free == with.free + (1 + 2 * 4) * 4096);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  page = i_find("v")->page->slot;
  place[0] = CAS_HEAD + CAS_RECORD * i_find("v@s")->place;
  CHECK(i_cas_close() == 0);
  i_forge(page, place[0] + 4, unknown, sizeof unknown);
  CHECK(i_cas_open(0) == -EOPNOTSUPP);
}

/* It is killed, and its id is that of the next volume. */
static void i_hidden(void) {
  struct nbdserve_export e = {0};
  unsigned char count[4];
  int status;
  pid_t pid;
  i_new(1, 0);
  CHECK(i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0);
    CHECK(nbdserve_cas_begin(i_cas, "h", 4096, &e) == 0);
    CHECK(e.ops->write(e.ctx, "h", 0, 1, 0) == 0);
    CHECK(e.ops->flush(e.ctx, 0) == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  i_peek(i_log_place() + 4036, count, sizeof count);
  CHECK(u_get32(count) == 0);
  i_volume.size = 0;
  CHECK(i_cas_open(0) == 0 && nbdserve_cas_create(i_cas, "w", 4096) == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_volume(i_cas, "w", &i_volume) == 0 && i_get(0) == 0);
  CHECK(i_cas_close() == 0);
}

/* In the same 4096 bytes, but not in the 512 that count, at both places */
static void i_badsector(void) {
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  fi[PREAD].bad = 512;
  fi[PREAD].also = (1 << 20) + 4095;
  CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_put(1, 'b') == 0);
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'b' && i_cas_close() == 0);
  fi[PREAD].also = (1 << 20) + 511;
  CHECK(i_cas_open(0) == 0 && i_cas_close() == 0); /* one of two is enough */
  fi[PREAD].bad = 511;
  CHECK(i_cas_open(0) == -EUCLEAN);
}

/* Where other people's labels are */
static void i_device(void) {
  static const off_t at[] = {
      0,        12345,         (1 << 20) - 1, 1 << 20, (2 << 20) - 1,
      31 << 20, (32 << 20) - 1};
  char b = 1;
  int i;
  close(open(path, O_RDWR | O_CREAT | O_TRUNC));
  CHECK(truncate(path, 32 << 20) == 0);
  fi_device = 1;
  for (i = 0; i < COUNT(at); i++) {
    i_poke(at[i], "x", 1);
    CHECK(nbdserve_cas_init(path, NULL) == -EEXIST);
    i_peek(at[i], &b, 1);
    CHECK(b == 'x');
    i_poke(at[i], "", 1);
  }
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_init(path, NULL) == -EEXIST); /* now it is a store */
}

/* After a kill, whatever the places of the log have: some of its pages may be
 * left that were not synced, or such as fit into none that it has had so far */
static void i_newlog(void) {
  unsigned char page[4096] = {0};
  uint64_t was, newest;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  was = i_replay();
  i_killed(1);
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'b' && i_cas_close() == 0);
  CHECK(i_replay() >= was + 1 + 4096);
  newest = i_replay() + 3 * 4096 + 5;
  u_put32(page + CAS_LOG_HEAD, CAS_LOG);
  u_put64(page + CAS_LOG_HEAD + 8, newest);
  i_poke(i_log_at(newest), page, sizeof page);
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'b' && i_cas_close() == 0);
  CHECK(i_replay() >= newest + 4096);
  u_put64(page + CAS_LOG_HEAD + 8, UINT64_MAX - INT32_MAX); /* rot */
  i_poke(i_log_at(i_replay() + 100), page, sizeof page);
  CHECK(i_cas_open(0) == 0 && i_put(2, 'c') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(2) == 'c' && i_cas_close() == 0);
}

/* Fills the store with data: blocks of v from one on. */
static uint64_t i_fill(uint64_t block) {
  int err = 0;
  for (; !err; block++)
    err = i_put(block, (int)block + 1000);
  CHECK(err == -ENOSPC);
  return block;
}

static void i_refused(void) {
  uint64_t n;
  int calls = 0, round, i;
  i_new(10, 32);
  n = i_fill(0);
  CHECK(n > 1000 && i_flush() == 0);
  for (round = 0; round < 2; round++) { /* in the first what there was goes */
    calls = fi[SYNC].calls;
    for (i = 0; i < 100; i++)
      CHECK(i_put(n, (int)n + i + 5000) == -ENOSPC);
  }
  CHECK(fi[SYNC].calls == calls && i_cas_close() == 0);
}

/* Of a full device, opened anew, nothing is known of segments that have nothing
 * free.  Where something gets free in them there is room for pages, too. */
static void i_freed(void) {
  uint64_t n, i;
  i_new(600, 32);
  n = i_fill(0);
  CHECK(n > 1000 && i_cas_close() == 0 && i_cas_open(0) == 0);
  CHECK(i_put(n, 1) == -ENOSPC);
  CHECK(i_volume.ops->trim(i_volume.ctx, 0, n * 4096, 0) == 0);
  CHECK(i_flush() == 0);
  for (i = 0; i < 500; i++)
    CHECK(i_put(i * I_LEAF, 1) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0 && i_cas_close() == 0);
}

/* There is no thread for what is to be done beside requests: who has asked for
 * it does it. */
static void i_alone(void) {
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  fi[THREAD].err = EAGAIN;
  fi[THREAD].times = -1;
  CHECK(i_cas_open(0) == 0 && i_cas->filled >= i_cas->to_fill);
  CHECK(!i_cas->busy && !i_cas->is_borrowed);
  CHECK(i_put(1, 'a') == 0 && i_slot(0) == i_slot(1) && i_flush() == 0);
  /* To say that it is durable takes a second without requests. */
  CHECK(NBDSERVE_NO_THREADS || i_cas->marked < i_cas->durable);
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'a' && i_cas_close() == 0);
}

/* Zeroes heal what is below a lost page, which until then is told of as data
 * that has to be read, and not as a hole. */
static void i_zeroed(void) {
  const uint64_t leaf = I_LEAF * 4096;
  unsigned char extents[4 * WIRE_EXT_EXTENT_LEN];
  uint64_t n;
  int level;
  for (level = 0; level < CAS_LEVELS; level++) {
    struct nbdserve_extents x = {0};
    i_new(2, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    i_lose(i_page(0, level));
    CHECK(i_cas_open(0) == 0 && i_get(0) == -EIO);
    x.left = 2 * leaf;
    x.max = 4;
    x.align = 1;
    x.each = 16;
    x.data = extents;
    CHECK(i_volume.ops->extents(i_volume.ctx, 0, x.left, 0, &x) == 0);
    CHECK(x.n > 0 && u_get64(extents + 8) == 0);
    n = level ? 2 * leaf : leaf;
    CHECK((x.n == 1 ? x.last_len : u_get64(extents)) == n);
    CHECK(i_volume.ops->zero(i_volume.ctx, 4096, 8192, 0) == 0);
    CHECK(i_get(0) == -EIO && i_get(1) == 0 && i_get(2) == 0);
    CHECK(i_get(3) == -EIO && i_cas_close() == 0 && i_cas_open(0) == 0);
    CHECK(i_get(0) == -EIO && i_get(1) == 0 && i_get(3) == -EIO);
    CHECK(i_volume.ops->zero(i_volume.ctx, 0, 2 * leaf, 0) == 0);
    CHECK(i_get(0) == 0 && i_get(3) == 0 && i_get(I_LEAF) == 0);
    CHECK(i_cas_close() == 0 && i_cas_open(0) == 0 && i_verify() == 0);
    CHECK(i_get(0) == 0 && i_cas_close() == 0);
  }
}

/* A page of a map of which neither copy can be read, or one is wrong and the
 * other cannot be read, may be there again tomorrow: until loss is accepted it
 * is not given up. */
static void i_awhile(void) {
  uint32_t page;
  int i, level;
  for (level = 0; level < CAS_LEVELS; level++)
    for (i = 0; i < 2; i++) {
      i_new(1, 0);
      CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
      page = i_page(0, level);
      fi[PREAD].bad = i_slot_at(page + (i ? CAS_TWIN : 0)) + 1;
      fi[PREAD].also = i_slot_at(page + (i ? 0 : CAS_TWIN)) + 1;
      CHECK(i_cas_open(0) == -EUCLEAN);
      CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == -EUCLEAN);
      fi[PREAD].also = 0;
      i_flip(i_slot_at(page + (i ? 0 : CAS_TWIN)) + 200);
      CHECK(i_cas_open(0) == -EUCLEAN);
      CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0 && i_get(0) == -EIO);
      CHECK(i_cas_close() == 0);
      fi[PREAD].bad = 0;
      CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
    }
}

/* What recovery has checked is found by the index as what it has not. */
static void i_checked(void) {
  struct nbdserve_export e = {0};
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  i_killed(1);
  CHECK(i_cas_open(0) == 0);
  CHECK(nbdserve_cas_begin(i_cas, "x", 1, &e) == 0); /* the index is full */
  CHECK(nbdserve_cas_finish(i_cas, &e, 0) == 0);
  CHECK(i_put(2, 'b') == 0 && i_slot(1) == i_slot(2));
  CHECK(i_put(3, 'a') == 0 && i_slot(0) == i_slot(3) && i_cas_close() == 0);
}

/* Gc keeps, beyond the reserve, as many pairs as a segment has: if the disk is
 * full at once, what is there can be written again, and there can be a snapshot
 * of it.  So many pages are in use that little more than the reserve would be
 * left without. */
static void i_kept(void) {
  uint64_t bytes, i;
  uint32_t npairs, x;
  int err;
  i_new(200, 0);
  for (i = 0; i < 6 * I_LEAF; i++)
    CHECK(i_put(i, (int)i + 1) == 0);
  for (i = 10; i < 128; i++)
    CHECK(i_put(i * I_LEAF, 7) == 0);
  CHECK(i_flush() == 0);
  CHECK(i_volume.ops->trim(i_volume.ctx, 0, 5 * I_LEAF * 4096, 0) == 0);
  err = nbdserve_cas_gc(i_cas, &bytes, NULL, NULL);
  CHECK(err == 0 || err == -EOPNOTSUPP);
  fi[FALLOCATE].err = ENOSPC;
  fi[FALLOCATE].times = -1;
  os_lock(&i_cas->lock);
  npairs = i_cas->npairs - i_cas->ndirty;
  for (x = 0; x < i_cas->nslots && !err; x += CAS_SEGMENT)
    if (cas_segment(i_cas, x)->space == SPACE_UNKNOWN)
      cas_adjust(i_cas, x, SPACE_FULL, 0, 0); /* as who writes finds out */
  cas_unlock(i_cas);
  CHECK(npairs >= CAS_RESERVE_PAIRS + CAS_TWIN);
  for (i = 5 * I_LEAF; i < 5 * I_LEAF + 100; i++)
    CHECK(i_put(i, (int)i + 100000) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0 && i_cas_close() == 0);
}

/* A snapshot from which something was trimmed has the id of its contents, also
 * if the one that it begins with was sealed before, and the store was opened
 * anew: then a page has no more room than it needs. */
static void i_trimmed(void) {
  struct nbdserve_export e = {0};
  static int b[1024];
  char id[3][72];
  uint64_t far = 5; /* below kid 5 of a page of that level */
  int level;
  for (level = 1; level < CAS_LEVELS; level++) {
    far *= I_LEAF;
    i_new(far / I_LEAF + 1, 0);
    CHECK(i_put(0, 'a') == 0 && i_put(far, 'b') == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@1") == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@1", id[0], NULL, NULL) == 0);
    CHECK(i_volume.ops->trim(i_volume.ctx, far * 4096, 4096, 0) == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@2") == 0);
    CHECK(nbdserve_cas_create(i_cas, "w", i_volume.size) == 0);
    CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
    CHECK(i_volume.ops->read(i_volume.ctx, b, 0, sizeof b, 0) == 0);
    CHECK(e.ops->write(e.ctx, b, 0, sizeof b, 0) == 0);
    e.ops->close(e.ctx);
    CHECK(nbdserve_cas_snapshot(i_cas, "w@1") == 0);
    CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@2", id[1], NULL, NULL) == 0);
    CHECK(nbdserve_cas_seal(i_cas, "w@1", id[2], NULL, NULL) == 0);
    CHECK(strcmp(id[0], id[1]) && !strcmp(id[1], id[2]));
    CHECK(i_cas_close() == 0);
  }
}

/* Each allocation of a change fails in turn: in the end there are as many free
 * slots as are found when it is opened. */
static void i_undone(void) {
  struct nbdserve_cas_stat running, opened;
  int n, err, done = 0, failed = 0;
  const char *name[2] = {"v", "w"}, *other;
  i_new(1, 0);
  for (n = 1; !done; n++) {
    CHECK(n < 100);
    CHECK(i_put(0, n) == 0);
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = n;
    err = nbdserve_cas_rename(i_cas, name[0], name[1]);
    done = fi[MALLOC].calls < n;
    fi[MALLOC].bad = 0;
    CHECK(err == 0 || (err == -ENOMEM && !done));
    failed += err != 0;
    if (err) continue;
    other = name[0];
    name[0] = name[1];
    name[1] = other;
  }
  CHECK(failed > 5);
  if (*name[0] == 'w') CHECK(nbdserve_cas_rename(i_cas, "w", "v") == 0);
  nbdserve_cas_stat(i_cas, &running);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  nbdserve_cas_stat(i_cas, &opened);
  CHECK(running.free == opened.free && running.stored == opened.stored);
  CHECK(i_cas_close() == 0);
}

/* The reserve is there; from now on so many pairs are free, and no more. */
static void i_pairs(uint32_t n) {
  os_lock(&i_cas->lock);
  CHECK(i_cas->npairs >= i_cas->ndirty + CAS_RESERVE_PAIRS);
  while (i_cas->npairs > n)
    (void)cas_take_pair(i_cas);
  i_lenient = 1;
  CHECK(i_cas->npairs == n);
  cas_unlock(i_cas);
}

/* Leaves that a snapshot has, too, are copied as long as that leaves the
 * reserve alone, and then no more; removing takes the last of it. */
static void i_reserve(void) {
  uint64_t i;
  int err = 0;
  i_new(220, 32);
  for (i = 0; i < 400; i++) /* what is left in a leaf needs a page */
    CHECK(i_put(i / 2 * I_LEAF + i % 2, 'a') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  i_fill(210 * I_LEAF);
  for (i = 0; i < 200 && !err; i++)
    err = i_volume.ops->zero(i_volume.ctx, i * I_LEAF * 4096, 4096, 0);
  CHECK(err == -ENOSPC);
  CHECK(nbdserve_cas_rename(i_cas, "v", "w") == 0);
  CHECK(nbdserve_cas_rename(i_cas, "w", "v") == 0);
  i_pairs(CAS_FOR_RM + 2); /* three are for the pages of the catalog */
  CHECK(nbdserve_cas_rename(i_cas, "v", "w") == -ENOSPC);
  CHECK(i_volume.ops->zero(i_volume.ctx, 210 * I_LEAF * 4096, 4096, 0) ==
        -ENOSPC);
  CHECK(nbdserve_cas_rm(i_cas, "v@s") == 0);
  CHECK(i_cas_close() == 0);
}

/* What is lost, or lies below what is shared, gives nothing back when it is
 * made anew, so it leaves the reserve alone. */
static void i_lossfull(void) {
  uint64_t i;
  int err = 0;
  i_new(220, 32);
  for (i = 0; i < 220; i++)
    CHECK(i_put(i * I_LEAF, 'a') == 0);
  CHECK(i_cas_close() == 0);
  i_lose(i_page(0, 1));
  CHECK(i_cas_open(0) == 0 && i_get(0) == -EIO);
  CHECK(nbdserve_cas_create(i_cas, "w", 32 << 20) == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_volume(i_cas, "w", &i_volume) == 0);
  i_fill(0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  for (i = 0; i < 220 && !err; i++)
    err = i_volume.ops->zero(i_volume.ctx, i * I_LEAF * 4096, 4096, 0);
  CHECK(err == -ENOSPC);
  os_lock(&i_cas->lock);
  CHECK(i_cas->npairs >= i_cas->ndirty + CAS_RESERVE_PAIRS);
  cas_unlock(i_cas);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  CHECK(i_volume.ops->zero(i_volume.ctx, 0, 220 * I_LEAF * 4096, 0) == 0);
  CHECK(i_get(219 * I_LEAF) == 0 && i_cas_close() == 0);
}

/* Where the file system gives no space, there is some in a segment only if it
 * can be written: a power cut may have left a free slot its digest, but not its
 * space. */
static void i_halfthere(void) {
  unsigned char given[CAS_DIGEST_LEN];
  uint32_t taken = 200;
  int how, err;
  memset(given, 255, sizeof given);
  for (how = 0; how < 3; how++) { /* 2: one is taken, and not yet written */
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0 && i_cas_open(0) == 0);
    fi[FALLOCATE].err = ENOSPC;
    fi[FALLOCATE].times = -1;
    if (how == 1) fi[PWRITE].bad = i_slot_at(taken) + 1;
    if (how == 2) i_poke(i_digest_at(taken), given, sizeof given);
    os_lock(&i_cas->lock);
    CHECK(cas_segment(i_cas, 0)->space == SPACE_UNKNOWN);
    if (how == 2) cas_hold(i_cas, taken);
    err = cas_give_space(i_cas, 0);
    CHECK(err == (how == 2 ? -ENOSPC : how == 1 ? -EIO : 0));
    CHECK((cas_segment(i_cas, 0)->space == SPACE_UNKNOWN) == (how > 0));
    if (how == 2) cas_drop(i_cas, taken, &i_cas->dropped);
    cas_unlock(i_cas);
    fi[FALLOCATE].times = 0;
    fi[PWRITE].bad = 0;
    CHECK(i_get(0) == 'a' && i_verify() == 0 && i_cas_close() == 0);
  }
}

/* An entry that is not known to be durable, and of which the digest is another
 * one and cannot be written, is left out, and its slot is free. */
static void i_confirm(void) {
  unsigned char digest[32] = "another one";
  uint32_t slot;
  i_new(1, 0);
  CHECK(i_put(1, 'a') == 0 && i_flush() == 0 && i_cas_close() == 0);
  i_killed(1);
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0 && i_get(1) == 'b');
  slot = i_slot(1);
  CHECK(i_cas_close() == 0);
  i_poke(i_digest_at(slot), digest, sizeof digest);
  fi[PWRITE].bad = i_digest_at(slot) + 5;
  CHECK(i_cas_open(0) == 0 && i_get(1) == 'a');
  CHECK(CAS_AT(i_cas, slot, refs) == 0 && !CAS_AT(i_cas, slot, tag));
  fi[PWRITE].bad = 0;
  CHECK(i_put(2, 'c') == 0 && i_get(2) == 'c' && i_cas_close() == 0);
}

/* Both copies of the page of block 0's leaf are that of another leaf. */
static void i_otherleaf(void) {
  unsigned char page[4096];
  uint32_t slot;
  i_new(2, 0);
  CHECK(i_put(0, 'a') == 0 && i_put(I_LEAF, 'b') == 0 && i_cas_close() == 0);
  slot = i_page(0, 0);
  i_peek(i_slot_at(i_page(I_LEAF, 0)), page, sizeof page);
  i_forge(slot, 0, page, sizeof page);
  CHECK(i_cas_open(0) == 0 && i_get(0) == -EIO && i_get(I_LEAF) == 'b');
  CHECK(i_cas_close() == 0);
}

/* One copy of a page is damaged, and neither digest can be read. */
static void i_nodigests(void) {
  uint32_t slot;
  int i;
  for (i = 0; i < 2; i++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    slot = i_page(0, 0);
    i_flip(i_slot_at(slot + (i ? CAS_TWIN : 0)) + 200);
    fi[PREAD].bad = i_digest_at(slot) + 1;
    fi[PREAD].also = i_digest_at(slot + CAS_TWIN) + 1;
    CHECK(i_cas_open(0) == 0 && i_get(0) == 'a');
    fi[PREAD].bad = fi[PREAD].also = 0;
    CHECK(i_cas_close() == 0);
  }
}

/* The slot of the page with the record of v in a store that is closed */
static uint32_t i_record_page(void) {
  uint32_t slot;
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0);
  slot = i_find("v")->page->slot;
  CHECK(i_cas_close() == 0);
  return slot;
}

/* What has no meaning in a record is written as zeroes. */
static void i_fields(void) {
  unsigned char b[40], zeroes[sizeof b] = {0};
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  memset(b, 255, sizeof b);
  i_forge(i_record_page(), CAS_HEAD + 72, b, sizeof b);
  CHECK(i_cas_open(0) == 0 && i_put(1, 'b') == 0 && i_cas_close() == 0);
  i_peek(i_slot_at(i_record_page()) + CAS_HEAD + 72, b, sizeof b);
  CHECK(!memcmp(b, zeroes, sizeof b));
}

/* A new log begins at no place that the replay still needs, though all others
 * cannot be written: the checkpoint may not come to its end. */
static void i_tinylog(void) {
  struct nbdserve_cas_options o = {0};
  uint64_t replay;
  int status, i;
  pid_t pid;
  o.log_pages = 8;
  CHECK(nbdserve_cas_init(path, &o) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0);
    i_cas->busy = 1; /* so that it makes no checkpoint */
    for (i = 0; i < 6; i++)
      CHECK(i_put((uint64_t)i, i + 100) == 0 && i_flush() == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  replay = i_replay();
  fi[PWRITE].bad = (2 << 20) + (off_t)((replay + 6) % 8 * 4096) + 1;
  fi[PWRITE].also = (2 << 20) + (off_t)((replay + 7) % 8 * 4096) + 1;
  fi[SYNC].err = EIO;
  fi[SYNC].skip = 4; /* three of the superblocks, one of the new log */
  fi[SYNC].times = -1;
  CHECK(i_cas_open(0) == -EIO);
  fi[SYNC].times = fi[SYNC].skip = 0;
  fi[PWRITE].bad = fi[PWRITE].also = 0;
  CHECK(i_cas_open(0) == 0);
  for (i = 0; i < 6; i++)
    CHECK(i_get((uint64_t)i) == i + 100);
  i_lenient = 1; /* of a store with another log */
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

/* Of the log only the last page is not known to be durable.  What it drops is
 * not written over before a sync. */
static void i_lastpage(void) {
  unsigned char zeroes[4096] = {0};
  uint64_t page;
  int status, i;
  pid_t pid;
  i_new(1, 0);
  CHECK(i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0);
    for (i = 0; i < 1000; i++) /* the last one goes to a new segment */
      CHECK(i_put((uint64_t)i, i + 100) == 0);
    CHECK(i_flush() == 0);
    page = i_cas->seq;
    CHECK(i_put(999, 'b') == 0 && i_cas->seq == page);
    _exit((int)(page - i_replay()));
  }
  CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
  page = i_replay() + (uint64_t)WEXITSTATUS(status);
  fi[FALLOCATE].err = EOPNOTSUPP;
  fi[FALLOCATE].times = -1;
  fi[SYNC].err = EIO;
  fi[SYNC].skip = 3; /* those of the superblocks */
  fi[SYNC].times = -1;
  CHECK(i_cas_open(0) == -EIO);
  fi[SYNC].times = fi[SYNC].skip = 0;
  i_poke(i_log_at(page), zeroes, sizeof zeroes); /* a cut has taken it */
  CHECK(i_cas_open(0) == 0 && i_get(999) == 999 + 100);
  CHECK(i_cas_close() == 0);
}

static int i_remove_first(void *is_over, uint64_t done, uint64_t total) {
  (void)total;
  if (done && !t_hold(is_over, -1)) {
    t_hold(is_over, 1);
    CHECK(nbdserve_cas_rm(i_cas, "a") == 0);
  }
  return 0;
}

/* A volume goes while it is verified: the next one is checked from its
 * beginning, and is not told to have what was damaged in the other. */
static void i_removed(void) {
  struct nbdserve_export e = {0};
  int b[1024] = {0}, i, is_over = 0;
  i_new(1, 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_rm(i_cas, "v") == 0);
  CHECK(nbdserve_cas_create(i_cas, "a", 1000 * sizeof b) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 300 * sizeof b) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "a", &e) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  for (i = 0; i < 1000; i++) {
    b[0] = i + 1;
    CHECK(e.ops->write(e.ctx, b, (uint64_t)i * sizeof b, sizeof b, 0) == 0);
  }
  for (i = 0; i < 300; i++)
    CHECK(i_put((uint64_t)i, i + 7000) == 0);
  e.ops->close(e.ctx);
  CHECK(i_flush() == 0);
  i_flip(i_slot_at(i_slot(0)) + 5);
  *i_told = '\0';
  CHECK(nbdserve_cas_verify(i_cas, i_tell, i_remove_first, &is_over) ==
        -EUCLEAN);
  CHECK(!strcmp(i_told, "v 0 4096 the data is not what it was;"));
  CHECK(i_cas_close() == 0);
}

/* Blocks filled with these numbers are different, but the index knows them by
 * the same 30 bits of their digests. */
static void i_alike(void) {
  enum {
    ONE = 9850,
    OTHER = 56814
  };
  uint32_t slot[2];
  i_new(1, 0);
  CHECK(i_put(0, ONE) == 0 && i_put(1, OTHER) == 0);
  slot[0] = i_slot(0);
  slot[1] = i_slot(1);
  CHECK(slot[0] != slot[1] && CAS_AT(i_cas, slot[0], tag) & TAG_INDEXED);
  CHECK(CAS_AT(i_cas, slot[0], tag) == CAS_AT(i_cas, slot[1], tag));
  CHECK(i_put(2, ONE) == 0 && i_slot(2) == slot[0]);
  CHECK(i_put(3, OTHER) == 0 && i_slot(3) == slot[1]);
  CHECK(i_get(0) == ONE && i_get(1) == OTHER && i_get(3) == OTHER);
  CHECK(i_cas_close() == 0);
}

static int i_fail_syncs(void *unused, uint64_t done, uint64_t total) {
  (void)unused, (void)done, (void)total;
  if (fi[SYNC].times) return 0;
  fi[SYNC].err = EIO;
  fi[SYNC].times = -1;
  fi[FALLOCATE].calls = 0;
  return 0;
}

/* Nothing is given back before the note that it will be is durable. */
static void i_noted(void) {
  struct nbdserve_export e = {0};
  uint64_t bytes;
  int b[1024] = {0};
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 4 << 20) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  for (b[0] = 1; b[0] < 1016; b[0]++)
    CHECK(e.ops->write(e.ctx, b, (uint64_t)b[0] * sizeof b, sizeof b, 0) == 0);
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  CHECK(nbdserve_cas_gc(i_cas, &bytes, i_fail_syncs, NULL) == -EIO);
  CHECK(fi[SYNC].times && !fi[FALLOCATE].calls);
  CHECK(i_cas_close() == -EIO);
}

/* A page of the catalog stays while it has a record, if only of a volume
 * without data. */
static void i_last(void) {
  struct nbdserve_export e = {0};
  char name[8];
  int i;
  i_new(1, 0);
  for (i = 1; i <= 15; i++) {
    snprintf(name, sizeof name, "w%d", i);
    CHECK(nbdserve_cas_create(i_cas, name, 5) == 0);
  }
  CHECK(i_find("w15")->place == 15);
  for (i = 1; i < 15; i++) {
    snprintf(name, sizeof name, "w%d", i);
    CHECK(nbdserve_cas_rm(i_cas, name) == 0);
  }
  CHECK(nbdserve_cas_rename(i_cas, "w15", "x") == 0);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "x", &e) == 0);
  e.ops->close(e.ctx);
  CHECK(i_cas_close() == 0);
}

/* In one change a snapshot is made and gone back to, and names are those of the
 * moment. */
static void i_one(void) {
  const struct nbdserve_cas_op back[] = {
      {NBDSERVE_CAS_SNAPSHOT, "v@s", NULL, 0},
      {NBDSERVE_CAS_ROLLBACK, "v@s", NULL, 0}};
  const struct nbdserve_cas_op names[] = {{NBDSERVE_CAS_RENAME, "v", "w", 0},
                                          {NBDSERVE_CAS_RM, "w@s", NULL, 0}};
  size_t failed;
  i_new(1, 0);
  CHECK(i_put(5, 'a') == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_changes(i_cas, back, 2, &failed) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  CHECK(i_volume.size == (uint64_t)I_LEAF * 4096 && i_get(5) == 'a');
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_changes(i_cas, names, 2, &failed) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &i_volume) == 0);
  CHECK(i_get(5) == 'a' && i_cas_close() == 0);
}

/* What a change must leave alone is what the strictest of its parts must: the
 * reserve stays though the last of them removes. */
static void i_strict(void) {
  const struct nbdserve_cas_op ops[] = {{NBDSERVE_CAS_CREATE, "x", NULL, 5},
                                        {NBDSERVE_CAS_RM, "w", NULL, 0}};
  size_t failed;
  i_new(10, 32);
  CHECK(nbdserve_cas_create(i_cas, "w", 5) == 0);
  i_fill(0);
  CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  i_pairs(CAS_FOR_RM + 10);
  CHECK(nbdserve_cas_changes(i_cas, ops, 2, &failed) == -ENOSPC);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  CHECK(i_cas_close() == 0);
}

/* Where a digest cannot be read an id is made of the data, though that was
 * found good before and is not in memory. */
static void i_idread(void) {
  struct nbdserve_export e = {0};
  char id[2][72];
  int b[1024], i;
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "w", i_volume.size) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  for (i = 0; i < 3; i++) {
    CHECK(i_put((uint64_t)i, 'a' + i) == 0);
    CHECK(i_volume.ops->read(i_volume.ctx, b, (uint64_t)i * sizeof b, sizeof b,
                             0) == 0);
    CHECK(e.ops->write(e.ctx, b, (uint64_t)i * sizeof b, sizeof b, 0) == 0);
  }
  e.ops->close(e.ctx);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "w@s") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id[0], NULL, NULL) == 0);
  fi[PREAD].bad = i_digest_at(i_slot(1));
  CHECK(nbdserve_cas_seal(i_cas, "w@s", id[1], NULL, NULL) == 0);
  fi[PREAD].bad = 0;
  CHECK(!strcmp(id[0], id[1]) && i_cas_close() == 0);
}

/* A block that is not in memory when it is read stays in the index. */
static void i_indexed(void) {
  static unsigned char b[4096];
  struct nbdserve_req r = {0};
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  r.type = NBD_CMD_READ;
  r.len = 4096;
  r.buf = b;
  fi_away = i_slot_at(i_slot(0));
  fi_away_end = fi_away + 4096;
  cas_batch(i_volume.ctx, &r, 1);
  CHECK(r.err == (i_cas->can_read_now ? -EAGAIN : 0));
  fi_away = fi_away_end = 0;
  CHECK(i_put(1, 'a') == 0 && i_slot(0) == i_slot(1));
  CHECK(i_cas_close() == 0);
}

/* A block whose digest cannot be read is not known to be good: the same data is
 * stored again, and is there when the digest turns out to be another one. */
static void i_notgood(void) {
  char b[32] = "another one";
  off_t at;
  uint32_t slot;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  os_lock(&i_cas->lock);
  while (i_cas->busy)
    cas_wait(i_cas);
  cas_unlock(i_cas);
  slot = i_slot(0);
  at = i_digest_at(slot);
  fi[PREAD].bad = at + 5;
  CHECK(i_get(0) == 'a');
  CHECK(i_put(1, 'a') == 0 && i_slot(1) != slot);
  fi[PREAD].bad = 0;
  i_poke(at, b, sizeof b);
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  CHECK(i_get(0) == -EIO && i_get(1) == 'a' && i_cas_close() == 0);
}

/* What removing frees can be used where a write has found no space before. */
static void i_room(void) {
  struct nbdserve_export e = {0};
  int b[1024] = {0}, i;
  uint64_t n;
  uint32_t x;
  i_new(10, 32);
  CHECK(nbdserve_cas_create(i_cas, "w", 1000 * sizeof b) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  for (i = 0; i < 1000; i++) {
    b[0] = i + 1;
    CHECK(e.ops->write(e.ctx, b, (uint64_t)i * sizeof b, sizeof b, 0) == 0);
  }
  e.ops->close(e.ctx);
  n = i_fill(0);
  for (x = 0; x < i_cas->nslots; x += CAS_SEGMENT)
    if (!cas_segment(i_cas, x)->nfree) cas_pass_over(i_cas, x, -ENOSPC);
  CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
  for (i = 0; i < 900; i++)
    CHECK(i_put(n++, i + 5000000) == 0);
  CHECK(i_cas_close() == 0);
}

/* Where zeroes are written to give a segment space, what only waits to be free
 * is left alone: a power cut would bring it back. */
static void i_pending(void) {
  char zeroes[4096] = {0}, was[4096], now[4096];
  uint32_t slot;
  int i;
  i_new(300, 0);
  for (i = 0; i < 2000; i++)
    CHECK(i_put((uint64_t)i, i + 1) == 0);
  CHECK(i_volume.ops->trim(i_volume.ctx, 100 * 4096, 900 * 4096, 0) == 0);
  CHECK(i_volume.ops->trim(i_volume.ctx, 1600 * 4096, 400 * 4096, 0) == 0);
  CHECK(i_put(1600, 'a') == 0 && i_flush() == 0);
  CHECK(i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0);
  for (slot = 1599; slot > 0; slot--) /* a block next to room for pages */
    if (cas_segment(i_cas, i_slot(slot))->npairs) break;
  i = (int)slot;
  CHECK(slot > 0);
  slot = i_slot((uint64_t)i);
  CHECK(slot / CAS_SEGMENT > 3);
  i_peek(i_slot_at(slot), was, sizeof was);
  fi[FALLOCATE].err = EOPNOTSUPP;
  fi[FALLOCATE].times = -1;
  CHECK(i_put((uint64_t)i, 999999) == 0);
  CHECK(CAS_AT(i_cas, slot, refs) == CAS_PENDING);
  CHECK(cas_segment(i_cas, slot)->space == SPACE_UNKNOWN);
  os_lock(&i_cas->lock); /* as who wants more pairs does */
  CHECK(cas_give_space(i_cas, slot / CAS_SEGMENT * CAS_SEGMENT) == 0);
  cas_unlock(i_cas);
  CHECK(CAS_AT(i_cas, slot, refs) == CAS_PENDING);
  i_peek(i_slot_at(slot), now, sizeof now);
  CHECK(memcmp(was, zeroes, sizeof was) && !memcmp(was, now, sizeof was));
  fi[FALLOCATE].times = 0;
  CHECK(i_cas_close() == 0);
}

static void *i_flushes(void *unused) {
  (void)unused;
  return (void *)(intptr_t)i_flush();
}

/* What is dropped while a sync runs, in a segment that was given back and got
 * again, keeps its digest until it is free: a power cut would bring it back. */
static void i_digests(void) {
  unsigned char was[32], now[32];
  int is_syncing;
  uint32_t slot;
  pthread_t sync;
  void *err;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_flush() == 0);
  slot = i_slot(0);
  i_peek(i_digest_at(slot), was, sizeof was);
  os_lock(&i_cas->lock); /* as after a cut, which has brought that back */
  CHECK(cas_segment(i_cas, slot)->space == SPACE_DURABLE);
  cas_segment(i_cas, slot)->is_given = 1;
  CHECK(cas_give_space(i_cas, i_cas->nslots) == 0); /* it waits for the sync */
  cas_unlock(i_cas);
  CHECK(i_put(1, 'b') == 0);
  t_hold(&fi[SYNC].hold, 1);
  CHECK(pthread_create(&sync, NULL, i_flushes, NULL) == 0);
  do {
    usleep(1000);
    os_lock(&i_cas->lock);
    is_syncing = i_cas->syncing;
    os_unlock(&i_cas->lock);
  } while (!is_syncing);
  CHECK(i_put(0, 'c') == 0 && CAS_AT(i_cas, slot, refs) == CAS_PENDING);
  t_hold(&fi[SYNC].hold, 0);
  CHECK(pthread_join(sync, &err) == 0 && !err);
  CHECK(CAS_AT(i_cas, slot, refs) == CAS_PENDING);
  CHECK(!cas_segment(i_cas, slot)->is_given);
  i_peek(i_digest_at(slot), now, sizeof now);
  CHECK(!memcmp(was, now, sizeof was));
  CHECK(i_cas_close() == 0);
}

/* A group has its own digests: a segment is not broken because the last one of
 * the group before it is. */
static void i_group(void) {
  off_t at;
  char is[6];
  i_new(1, 0);
  at = (off_t)cas_digest_off(i_cas, CAS_SLOTS + 1000);
  os_lock(&i_cas->lock);
  CHECK(cas_extend(i_cas, CAS_SLOTS - 1) == 0);
  CHECK(i_cas->nslots == CAS_SLOTS);
  cas_unlock(i_cas);
  cas_pass_over(i_cas, CAS_SLOTS - 1, -EIO);
  os_lock(&i_cas->lock);
  CHECK(cas_give_space(i_cas, CAS_SLOTS) == 0);
  CHECK(cas_segment(i_cas, CAS_SLOTS)->space == SPACE_WRITTEN);
  CHECK(pwrite(i_cas->fd, "digest", 6, at) == 6);
  fi[FALLOCATE].err = EOPNOTSUPP; /* zeroes are written, to free slots only */
  fi[FALLOCATE].times = 1;
  CHECK(cas_give_space(i_cas, CAS_SLOTS) == 0);
  fi[FALLOCATE].times = 0;
  i_peek(at, is, sizeof is);
  CHECK(!memcmp(is, "digest", sizeof is));
  cas_unlock(i_cas);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
}

/* A lost page that is not the first of its level: writing heals below it. */
static void i_upper(void) {
  const uint64_t at = (uint64_t)I_LEAF * I_LEAF + 5;
  int level;
  for (level = 0; level < 2; level++) {
    i_new(I_LEAF + 2, 0);
    CHECK(i_put(at, 'a') == 0 && i_put(at + I_LEAF, 'b') == 0);
    CHECK(i_cas_close() == 0);
    i_lose(i_page(at, level));
    CHECK(i_cas_open(0) == 0 && i_get(at) == -EIO);
    CHECK(i_put(at, 'c') == 0 && i_get(at) == 'c' && i_cas_close() == 0);
    CHECK(i_cas_open(0) == 0 && i_get(at) == 'c');
    CHECK(i_get(at + I_LEAF) == (level ? -EIO : 'b'));
    CHECK(i_put(at + I_LEAF, 'd') == 0 && i_cas_close() == 0);
    CHECK(i_cas_open(0) == 0 && i_get(at + I_LEAF) == 'd');
    CHECK(i_cas_close() == 0);
  }
}

/* One wrong letter is damage, and the other superblock is enough. */
static void i_letter(void) {
  int i;
  for (i = 0; i < 7; i++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    i_flip((i % 2 ? 1 << 20 : 0) + i);
    CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
  }
}

/* The end of a volume inside a block is replayed like any other. */
static void i_oddend(void) {
  struct nbdserve_export e = {0};
  char b[512] = "tail", c[512] = "";
  int status;
  pid_t pid;
  i_new(1, 0);
  CHECK(nbdserve_cas_create(i_cas, "w", 4096 + 512) == 0);
  CHECK(i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0);
    CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
    CHECK(e.ops->write(e.ctx, b, 4096, sizeof b, 0) == 0);
    CHECK(e.ops->flush(e.ctx, 0) == 0);
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  CHECK(i_cas_open(0) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
  CHECK(e.ops->read(e.ctx, c, 4096, sizeof c, 0) == 0);
  CHECK(!memcmp(b, c, sizeof b));
  e.ops->close(e.ctx);
  CHECK(i_cas_close() == 0);
}

static void *i_seal(void *id) {
  return (void *)(intptr_t)nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL);
}

/* Two who seal the same snapshot at once get the same id, and it takes the
 * space of one tree. */
static void i_sealtwo(void) {
  struct nbdserve_cas_stat running, opened;
  pthread_t thread[2];
  char id[2][72];
  void *err;
  int i;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  t_hold(&fi[SYNC].hold, 1);
  for (i = 0; i < 2; i++)
    CHECK(pthread_create(&thread[i], NULL, i_seal, id[i]) == 0);
  usleep(100000);
  t_hold(&fi[SYNC].hold, 0);
  for (i = 0; i < 2; i++)
    CHECK(pthread_join(thread[i], &err) == 0 && !err);
  CHECK(!strcmp(id[0], id[1]));
  CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  nbdserve_cas_stat(i_cas, &running);
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  nbdserve_cas_stat(i_cas, &opened);
  CHECK(running.stored == opened.stored && i_cas_close() == 0);
}

/* What the log says was durable, and rots then, is an error, and not what was
 * there before. */
static void i_rotten(void) {
  uint32_t slot;
  int status;
  pid_t pid;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
  CHECK((pid = fork()) >= 0);
  if (!pid) {
    CHECK(i_cas_open(0) == 0 && i_put(0, 'b') == 0 && i_flush() == 0);
    CHECK(i_put(1, 'c') == 0 && i_flush() == 0); /* which says it of 'b' */
    _exit(0);
  }
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  CHECK(i_cas_open(NBDSERVE_CAS_READONLY) == 0 && i_get(0) == 'b');
  slot = i_slot(0);
  CHECK(i_cas_close() == 0);
  i_flip(i_slot_at(slot) + 5);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  CHECK(i_get(0) == -EIO && i_get(1) == 'c' && i_cas_close() == 0);
}

/* Checkpoints have numbers above all that there were, also above that of one
 * which a power cut has ended, and of which pages may be left. */
static void i_numbers(void) {
  uint64_t tried;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  fi[SYNC].err = ENOSPC;
  fi[SYNC].times = -1;
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == -EIO);
  tried = i_cas->last_number;
  CHECK(tried > i_cas->super.number && i_cas_close() == -EIO);
  fi[SYNC].times = 0;
  CHECK(i_cas_open(0) == 0 && i_cas->super.number > tried);
  CHECK(i_cas->last_number >= i_cas->super.number && i_cas_close() == 0);
}

/* What gc cannot read the digests of, or cannot note as given back, stays; what
 * is in use is not touched, and the next one goes on. */
static void i_gcfails(void) {
  int calls[3], round, n;
  for (round = 0; round < 3; round++) {
    struct nbdserve_export e = {0};
    uint64_t bytes;
    i_new(1, 0);
    CHECK(nbdserve_cas_create(i_cas, "w", 4 << 20) == 0);
    CHECK(nbdserve_cas_volume(i_cas, "w", &e) == 0);
    for (n = 1; n < 1016; n++)
      CHECK(e.ops->write(e.ctx, &n, (uint64_t)n * 4096, sizeof n, 0) == 0);
    CHECK(i_put(0, 'a') == 0);
    e.ops->close(e.ctx);
    CHECK(nbdserve_cas_rm(i_cas, "w") == 0);
    fi[FALLOCATE].calls = 0;
    if (round < 2) fi[round].bad = i_digest_at(CAS_SEGMENT) + 5;
    if (round < 2) fi[round].also = i_digest_at(2 * CAS_SEGMENT) + 5;
    CHECK(nbdserve_cas_gc(i_cas, &bytes, NULL, NULL) == 0);
    calls[round] = fi[FALLOCATE].calls;
    if (round < 2) fi[round].bad = fi[round].also = 0;
    CHECK(i_get(0) == 'a' && i_verify() == 0);
    CHECK(nbdserve_cas_gc(i_cas, &bytes, NULL, NULL) == 0);
    CHECK(i_cas_close() == 0 && i_cas_open(0) == 0 && i_get(0) == 'a');
    CHECK(i_verify() == 0 && i_cas_close() == 0);
  }
  CHECK(calls[PREAD] < calls[2] && calls[PWRITE] < calls[2]);
}

/* A repair of which any one read fails makes nothing worse: the next one mends
 * all. */
static void i_mending(void) {
  uint32_t slot[2];
  int n, err, i;
  for (n = 0;; n++) {
    struct nbdserve_export e = {0};
    i_new_twice(slot);
    i_flip(i_slot_at(slot[0]) + 7);
    CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
    CHECK(nbdserve_cas_begin(i_cas, "x", 1, &e) == 0); /* the index is full */
    CHECK(nbdserve_cas_finish(i_cas, &e, 0) == 0);
    fi[PREAD].calls = 0;
    fi[PREAD].err = EIO;
    fi[PREAD].skip = n;
    fi[PREAD].times = 1;
    err = nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL);
    i = fi[PREAD].times; /* none was left to fail */
    fi[PREAD].skip = fi[PREAD].times = 0;
    CHECK(err == 0 || (!i && (err == -EUCLEAN || err == -EIO)));
    CHECK(nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL) == 0);
    CHECK(i_get(0) == 'a' && i_get(1) == 'a' && i_cas_close() == 0);
    if (i) break;
  }
  CHECK(n > 3);
}

/* An id is of what is there, even where the digest cannot be read that was
 * known to be right. */
static void i_sealed(void) {
  char id[2][72];
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@t") == 0);
  CHECK(i_cas_close() == 0 && i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  CHECK(i_get(0) == 'a'); /* now it is known */
  fi[PREAD].bad = i_digest_at(i_slot(0)) + 5;
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id[0], NULL, NULL) == 0);
  fi[PREAD].bad = 0;
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@t", id[1], NULL, NULL) == 0);
  CHECK(!strcmp(id[0], id[1]) && i_cas_close() == 0);
}

/* In a context of a snapshot what cannot be read counts as changed: a leaf that
 * is not in memory, while the medium fails. */
static void i_notclean(void) {
  unsigned char extents[16 * 4];
  struct nbdserve_extents x = {.align = 1, .max = 4, .each = 16};
  struct cas_volume *both[2];
  int i;
  i_new(2, 0);
  CHECK(i_put(0, 'a') == 0 && nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(i_put(1, 'b') == 0 && i_cas_close() == 0 && i_cas_open(0) == 0);
  both[0] = cas_find(i_cas, "v@s", 3, VIEW_NOW);
  both[1] = i_volume.ctx;
  os_lock(&i_cas->lock);
  i_cas->cache = 0;
  for (i = 0; i < 8; i++)
    cas_evict_leaf(i_cas);
  cas_unlock(i_cas);
  x.context = both[0]->id;
  x.left = 2 * I_LEAF * 4096;
  x.data = extents;
  fi[PREAD].err = EIO;
  fi[PREAD].times = -1;
  CHECK(i_volume.ops->extents(i_volume.ctx, 0, x.left, 0, &x) == 0);
  fi[PREAD].times = 0;
  CHECK(x.n == 2 && u_get64(extents + 8) == 1);
  CHECK(u_get64(extents) == I_LEAF * 4096 && u_get64(extents + 24) == 0);
  CHECK(i_cas_close() == 0);
}

/* A volume whose last block is damaged and cannot be cleared does not grow: old
 * data might come up behind its end. */
static void i_nogrowth(void) {
  struct cas_spot spot;
  uint64_t size;
  i_new(2, 0);
  size = 2 * I_LEAF * 4096;
  CHECK(i_put(3, 'a') == 0 && i_flush() == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_resize(i_cas, "v", 3 * 4096 + 100) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  CHECK(i_volume.ops->write(i_volume.ctx, "end", 3 * 4096, 3, 0) == 0);
  os_lock(&i_cas->lock);
  CHECK(!cas_find_spot(i_cas, cas_root(i_volume.ctx), 3, &spot) && spot.slot);
  cas_unlock(i_cas);
  CHECK(i_cas_close() == 0);
  i_flip(i_slot_at(spot.slot) + 50);
  CHECK(i_cas_open(NBDSERVE_CAS_VERIFY) == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_resize(i_cas, "v", size) == -EIO);
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0);
  CHECK(i_volume.size == 3 * 4096 + 100 && i_cas_close() == 0);
}

static int i_was_told, i_gone; /* (t_hold) */

static int i_waits(void *arg, const char *name, uint64_t off, uint64_t len,
                   const char *why) {
  int i;
  (void)arg, (void)off, (void)len, (void)why;
  t_hold(&i_was_told, 1);
  if (*name == 'v') usleep(200000);
  for (i = 0; *name == 'w' && i < 500 && !t_hold(&i_gone, -1); i++)
    usleep(10000);
  CHECK(*name == 'v' || t_hold(&i_gone, -1));
  return 0;
}

static void *i_verifies(void *unused) {
  CHECK(nbdserve_cas_verify(i_cas, i_waits, NULL, NULL) == -EUCLEAN);
  return unused;
}

/* Who removes a volume that is being verified waits for that step, and not for
 * the end of all. */
static void i_unpinned(void) {
  struct nbdserve_export w = {0};
  struct cas_spot spot;
  pthread_t thread;
  uint32_t slot[2];
  char b[4096];
  i_new(1, 0);
  memset(b, 'w', sizeof b);
  CHECK(nbdserve_cas_create(i_cas, "w", 4096) == 0);
  CHECK(nbdserve_cas_volume(i_cas, "w", &w) == 0);
  CHECK(i_put(0, 'v') == 0 && w.ops->write(w.ctx, b, 0, sizeof b, 0) == 0);
  slot[0] = i_slot(0);
  os_lock(&i_cas->lock);
  CHECK(!cas_find_spot(i_cas, cas_root(w.ctx), 0, &spot));
  cas_unlock(i_cas);
  slot[1] = spot.slot;
  w.ops->close(w.ctx);
  CHECK(i_cas_close() == 0);
  i_flip(i_slot_at(slot[0]));
  i_flip(i_slot_at(slot[1]));
  CHECK(i_cas_open(0) == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(pthread_create(&thread, NULL, i_verifies, NULL) == 0);
  while (!t_hold(&i_was_told, -1))
    usleep(1000);
  CHECK(nbdserve_cas_rm(i_cas, "v") == 0);
  t_hold(&i_gone, 1);
  pthread_join(thread, NULL);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

/* An id is of what is there, even where the snapshot that its tree begins with
 * has lost a page below which a block was that is not there any more. */
static void i_lostbase(void) {
  char id[2][72];
  uint32_t page;
  int i;
  for (i = 0; i < 2; i++) { /* 1: there is no such snapshot */
    i_new(2, 0);
    CHECK(i_put(0, 'a') == 0 && i_put(I_LEAF, 'b') == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@s") == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@s", id[i], NULL, NULL) == 0);
    CHECK(i_cas_close() == 0);
    page = i_page(0, 1);
    CHECK(i_cas_open(0) == 0);
    CHECK(i_volume.ops->trim(i_volume.ctx, 0, 4096, 0) == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@t") == 0);
    if (i) CHECK(nbdserve_cas_rm(i_cas, "v@s") == 0);
    CHECK(i_cas_close() == 0);
    if (!i) i_lose(page);
    CHECK(i_cas_open(0) == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@t", id[i], NULL, NULL) == 0);
    CHECK(i_cas_close() == 0);
  }
  CHECK(!strcmp(id[0], id[1]));
}

/* The sum of a log page is as the format has it, however many entries there
 * are, and whether it goes on from one that was computed before. */
static void i_log_sums(void) {
  unsigned char page[CAS_PAGE], all[CAS_PAGE + 16], sum[2][CAS_DIGEST_LEN];
  uint32_t mixed[2][SHA_STATE_WORDS];
  uint32_t n, len;
  int i;
  for (i = 0; i < CAS_PAGE; i++)
    page[i] = (unsigned char)(i % 251 + 1);
  for (n = 0; n <= 84; n++) {
    len = (n * 48 + 63) / 64 * 64;
    memset(all, 0, sizeof all);
    memcpy(all, page, n * 48);
    memcpy(all + len, page + 4032, 32);
    memcpy(all + len + 32, i_cas->super.id, 16);
    sha_256(0, all, NULL, len + 48, sum[0], NULL);
    cas_log_sum(i_cas, page, n ? n - 1 : 0, n, mixed, sum[1]);
    CHECK(!memcmp(sum[0], sum[1], CAS_DIGEST_LEN));
  }
}

/* Each field lies where the format says: else what another version has written
 * would be read as something else. */
static void i_format(void) {
  unsigned char p[512] = {0};
  struct cas_super s = {.magic = 1, .version = 2, .block_size = 3};
  struct cas_log_head l = {CAS_LOG, 2, 3, 4, 5};
  struct cas_entry e = {.volume = 1, .slot = 2, .block = 3, .digest = "4"};
  struct cas_head h = {CAS_MAP, 2, 3, 4};
  struct cas_record r = {.id = 1, .flags = 2, .size = 3, .root = 4};
  s.number = 5, s.replay = 6, s.log_pages = 7, s.nslots = 8, s.catalog = 9;
  s.next_id = 10, s.incompat = 11, s.ro_compat = 12, s.id[0] = 4;
  cas_encode(cas_super_sizes, &s, p);
  CHECK(u_get64(p) == 1 && u_get32(p + 8) == 2 && u_get32(p + 12) == 3);
  CHECK(p[16] == 4 && u_get64(p + 32) == 5 && u_get64(p + 40) == 6);
  CHECK(u_get32(p + 48) == 7 && u_get32(p + 52) == 8 && u_get32(p + 56) == 9);
  CHECK(u_get32(p + 60) == 10 && u_get32(p + 64) == 11);
  CHECK(u_get32(p + 68) == 12 && u_get64(p + 72) == 0);
  cas_encode(cas_log_sizes, &l, p);
  CHECK(!memcmp(p, "LOG1", 4) && u_get32(p + 4) == 2 && u_get64(p + 8) == 3);
  CHECK(u_get64(p + 16) == 4 && u_get64(p + 24) == 5);
  cas_encode(cas_entry_sizes, &e, p);
  CHECK(u_get32(p) == 1 && u_get32(p + 4) == 2 && u_get64(p + 8) == 3);
  CHECK(p[16] == '4');
  cas_encode(cas_head_sizes, &h, p);
  CHECK(!memcmp(p, "MAP1", 4) && u_get32(p + 4) == 2 && u_get32(p + 8) == 3);
  CHECK(u_get64(p + 12) == 4 && CAS_CAT == 0x43415431);
  r.levels = 5, r.created = 6, r.made_from = 7, r.digests = 8;
  r.cid[0] = 9, r.kept[0] = 10, r.name[0] = 11;
  cas_encode(cas_record_sizes, &r, p);
  CHECK(u_get32(p) == 1 && u_get32(p + 4) == 2 && u_get64(p + 8) == 3);
  CHECK(u_get32(p + 16) == 4 && u_get32(p + 20) == 5 && u_get64(p + 24) == 6);
  CHECK(u_get32(p + 32) == 7 && u_get32(p + 36) == 8 && p[40] == 9);
  CHECK(p[72] == 10 && p[112] == 11 && CAS_RECORD == 288);
  CHECK(CAS_IS_SNAPSHOT == 1 && CAS_IS_PARTIAL == 2);
  i_new(1, 0);
  i_log_sums();
  CHECK(i_cas_close() == 0);
}

/* What a change removes or renames leaves its name to a later part of the same
 * change: so one volume takes another one's place, and nobody sees neither. */
static void i_replaced(void) {
  const struct nbdserve_cas_op rename[] = {{NBDSERVE_CAS_RM, "w", NULL, 0},
                                           {NBDSERVE_CAS_RENAME, "v", "w", 0}};
  const struct nbdserve_cas_op anew[] = {
      {NBDSERVE_CAS_SNAPSHOT, "w@s", NULL, 0},
      {NBDSERVE_CAS_RENAME, "w", "v", 0},
      {NBDSERVE_CAS_CREATE, "w", NULL, 8192},
      {NBDSERVE_CAS_RM, "v@s", NULL, 0},
      {NBDSERVE_CAS_SNAPSHOT, "v@s", NULL, 0}};
  size_t failed;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && nbdserve_cas_create(i_cas, "w", 5) == 0);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_changes(i_cas, rename, 2, &failed) == 0);
  CHECK(nbdserve_cas_changes(i_cas, anew, 5, &failed) == 0);
  CHECK(i_find("w")->now.size == 8192 && i_find("v@s")->parent == i_find("v"));
  CHECK(nbdserve_cas_volume(i_cas, "v", &i_volume) == 0 && i_get(0) == 'a');
  CHECK(i_cas_close() == 0 && i_cas_open(0) == 0 && i_get(0) == 'a');
  CHECK(i_find("w")->now.size == 8192 && i_cas_close() == 0);
}

/* What is in one place of a superblock: a file system whose first bytes are
 * zeroes is kept; zeroes, and what cannot be read, are mended by verify; and if
 * neither is good, one that is damaged is enough to say that of the store. */
static void i_places(void) {
  char b[4096] = {0}, is[4096];
  off_t at;
  for (at = 0; at <= 1 << 20; at += 1 << 20) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0);
    memset(b, 0, sizeof b);
    i_poke(at, b, sizeof b);
    CHECK(i_verify() == 0);
    i_peek(at, is, sizeof is);
    CHECK(!memcmp(is, "NBDSCAS2", 8));
    fi[PREAD].bad = fi[PWRITE].bad = at ? at + 100 : 0;
    fi[PWRITE].heals = 1;
    CHECK(i_verify() == 0 && !fi[PREAD].bad && i_cas_close() == 0);
    i_peek((1 << 20) - at, is, sizeof is);
    i_flip(at + 100);
    i_poke((1 << 20) - at, b, sizeof b);
    CHECK(i_cas_open(0) == -EUCLEAN);
    i_flip(at + 100);
    i_poke((1 << 20) - at, is, sizeof is);
    memset(b + 1024, 7, 9);
    i_poke(at, b, sizeof b);
    CHECK(i_cas_open(0) == -EUCLEAN);
    i_peek(at, is, sizeof is);
    CHECK(!memcmp(b, is, sizeof b));
    CHECK(i_cas_open(NBDSERVE_CAS_REPAIR) == 0 && i_get(0) == 'a');
    CHECK(i_cas_close() == 0);
  }
}

static int i_ends(void *arg, uint64_t done, uint64_t total) {
  (void)arg, (void)done, (void)total;
  return 1;
}

/* Who is told to stop, or cannot read or sync what it has to, says so. */
static void i_ended(void) {
  struct cas_node *leaf;
  uint64_t bytes;
  char id[72];
  int n, err, left = 0;
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0 && nbdserve_cas_snapshot(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_gc(i_cas, &bytes, i_ends, NULL) == -ECANCELED);
  CHECK(nbdserve_cas_verify(i_cas, i_tell, i_ends, NULL) == -ECANCELED);
  CHECK(nbdserve_cas_repair(i_cas, NULL, i_tell, i_ends, NULL) == -ECANCELED);
  CHECK(nbdserve_cas_seal(i_cas, "v@s", id, i_ends, NULL) == -ECANCELED);
  CHECK(!*id && i_put(0, 'b') == 0 && i_cas_close() == 0);
  CHECK(i_cas_open(0) == 0);
  leaf = i_node(0, 0);
  os_lock(&i_cas->lock);
  cas_forget_leaf(i_cas, leaf);
  cas_unlock(i_cas);
  fi[PREAD].bad = i_slot_at(leaf->slot) + 1;
  fi[PREAD].also = i_slot_at(leaf->slot + CAS_TWIN) + 1;
  bytes = 0;
  CHECK(nbdserve_cas_diff(i_cas, "v", "v@s", i_range, &bytes) == -EIO);
  fi[PREAD].bad = fi[PREAD].also = 0;
  CHECK(nbdserve_cas_diff(i_cas, "v", "v@s", i_range, &bytes) == 0);
  CHECK(bytes == 4096 && i_cas_close() == 0);
  for (n = 0; !left; n++) { /* each sync fails in turn */
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0);
    if (n) i_pairs(CAS_RESERVE_PAIRS + 12); /* gc wants more */
    fi[SYNC].err = EIO;
    fi[SYNC].skip = n;
    fi[SYNC].times = 1;
    err = n ? nbdserve_cas_gc(i_cas, &bytes, NULL, NULL)
            : nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL);
    left = fi[SYNC].times;
    CHECK(left ? !err || err == -EOPNOTSUPP : err == -EIO);
    fi[SYNC].times = fi[SYNC].skip = 0;
    CHECK(i_cas_close() == (left ? 0 : -EIO));
  }
  CHECK(n > 3);
}

/* Where a write has found no space there may be some as soon as anything is
 * free again, by trimming, too: it takes no checkpoint. */
static void i_again(void) {
  uint64_t n, number;
  uint32_t x;
  int i;
  i_new(10, 32);
  n = i_fill(0);
  CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  for (x = 0; x < i_cas->nslots; x += CAS_SEGMENT)
    if (!cas_segment(i_cas, x)->nfree) cas_pass_over(i_cas, x, -ENOSPC);
  CHECK(i_put(n, 1) == -ENOSPC);
  number = i_cas->super.number;
  CHECK(i_volume.ops->trim(i_volume.ctx, 0, 500 * 4096, 0) == 0);
  CHECK(i_flush() == 0);
  for (i = 0; i < 450; i++)
    CHECK(i_put((uint64_t)i, i + 500000) == 0);
  CHECK(i_cas->super.number == number && i_cas_close() == 0);
}

/* A digest is written only behind its data: if that finds no space it still
 * says that it was given back. */
static void i_ahead(void) {
  unsigned char given[CAS_DIGEST_LEN], is[CAS_DIGEST_LEN];
  uint32_t slot;
  memset(given, 255, sizeof given);
  i_new(1, 0);
  CHECK(i_put(0, 'a') == 0);
  slot = i_slot(0) + 1;
  CHECK(!CAS_AT(i_cas, slot, refs));
  i_poke(i_digest_at(slot), given, sizeof given);
  fi[PWRITE].bad = i_slot_at(slot) + 1;
  CHECK(i_put(1, 'b') == 0 && i_slot(1) != slot);
  fi[PWRITE].bad = 0;
  i_peek(i_digest_at(slot), is, sizeof is);
  CHECK(!memcmp(given, is, sizeof given));
  CHECK(i_get(1) == 'b' && i_cas_close() == 0);
}

static void *i_checks(void *segment) {
  struct cas_verifier v = {.st = i_cas, .each = i_tell};
  v.data = t_alloc(2 * 4096);
  cas_verify_pages(&v, *(uint32_t *)segment);
  return (void *)(intptr_t)v.found;
}

/* Verify that comes while a checkpoint is written waits for it, and then pages
 * may have its number. */
static void i_beside(void) {
  pthread_t thread[2];
  void *err;
  uint32_t segment;
  int i, is_syncing;
  i_new(1, 0);
  i_volume.ops->close(i_volume.ctx);
  t_hold(&fi[SYNC].hold, 1);
  CHECK(pthread_create(&thread[0], NULL, i_rename, NULL) == 0);
  do {
    usleep(1000);
    os_lock(&i_cas->lock);
    is_syncing = i_cas->syncing;
    segment = i_cas->pair_cursor; /* where its pages are */
    os_unlock(&i_cas->lock);
  } while (!is_syncing);
  CHECK(pthread_create(&thread[1], NULL, i_checks, &segment) == 0);
  usleep(100000);
  t_hold(&fi[SYNC].hold, 0);
  for (i = 0; i < 2; i++)
    CHECK(pthread_join(thread[i], &err) == 0 && !err);
  CHECK(i_find("x")->page->slot / CAS_SEGMENT == segment / CAS_SEGMENT);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

/* One copy of a page is whole, and newer than the other, but only for that one
 * a digest vouches. */
static void i_vouched(void) {
  unsigned char page[4096], sum[32];
  uint32_t slot, copy;
  for (copy = 0; copy < 2; copy++) {
    i_new(1, 0);
    CHECK(i_put(0, 'a') == 0 && i_cas_close() == 0);
    CHECK(i_cas_open(0) == 0 && nbdserve_cas_create(i_cas, "w", 5) == 0);
    CHECK(i_cas_close() == 0);
    slot = i_page(0, 0);
    i_peek(i_slot_at(slot), page, sizeof page);
    u_put32(page + CAS_HEAD, 0);
    u_put64(page + 12, u_get64(page + 12) + 1);
    cas_sum_page(0, page, sizeof page, sum);
    i_poke(i_slot_at(slot + copy * CAS_TWIN), page, sizeof page);
    i_flip(i_digest_at(slot + (copy ? 0 : CAS_TWIN)));
    CHECK(i_cas_open(0) == 0 && i_get(0) == 'a' && i_cas_close() == 0);
  }
}

/* The log is full, and there is no space for the checkpoint that would make
 * room in it: that is an error of who asks, and passes. */
static void i_logfull(void) {
  struct nbdserve_cas_options o = {0};
  int i;
  o.log_pages = 8;
  CHECK(nbdserve_cas_init(path, &o) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", 1 << 20) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0 && i_cas_open(0) == 0);
  os_lock(&i_cas->lock);
  while (i_cas->busy)
    cas_wait(i_cas);
  i_cas->busy = 1; /* so that nobody else makes a checkpoint */
  cas_unlock(i_cas);
  for (i = 0; i_cas->seq - i_cas->super.replay < 6; i++)
    CHECK(i_put((uint64_t)i, i + 100) == 0 && i_flush() == 0);
  fi[FALLOCATE].err = fi[PWRITE].err = ENOSPC;
  fi[FALLOCATE].times = fi[PWRITE].times = -1;
  CHECK(i_volume.ops->zero(i_volume.ctx, 0, 4096, 0) == -ENOSPC);
  CHECK(i_get(0) == 100);
  fi[FALLOCATE].times = fi[PWRITE].times = 0;
  CHECK(i_volume.ops->zero(i_volume.ctx, 0, 4096, 0) == 0 && i_get(0) == 0);
  i_cas->busy = 0;
  i_lenient = 1; /* of a store with another log */
  CHECK(i_cas_close() == 0);
}

/* ---- The same with a store ---- */

static unsigned char y_kept[Y_MOST]; /* what v@s has */

static int y_find(void *ctx, const char *name, struct nbdserve_export *out) {
  (void)ctx;
  return nbdserve_cas_volume(i_cas, name, out);
}

static int y_list(void *ctx, nbdserve_emit_fn *emit, void *arg) {
  (void)ctx;
  return emit(arg, "v", "a volume"), 0;
}

static int y_counts(void *arg, const struct nbdserve_cas_info *info) {
  (void)info;
  ++*(int *)arg;
  return 0;
}

static int y_adds(void *arg, uint64_t off, uint64_t len) {
  (void)off;
  *(uint64_t *)arg += len;
  return 0;
}

static int y_import(void) {
  struct nbdserve_export e = {0};
  int err = nbdserve_cas_begin(i_cas, "i", y_size, &e), end;
  if (err) return err;
  err = e.ops->write(e.ctx, y_model, 0, y_size, 0);
  end = nbdserve_cas_finish(i_cas, &e, !err);
  return err ? err : end;
}

/* Every command, with v open */
static void y_commands(void) {
  int n = 0;
  uint64_t sum = 0;
  char id[72], again[72];
  Y_TWICE(nbdserve_cas_snapshot(i_cas, "v@s"));
  memcpy(y_kept, y_model, y_size);
  Y_TWICE(nbdserve_cas_clone(i_cas, "v@s", "c"));
  Y_TWICE(nbdserve_cas_resize(i_cas, "c", 5000));
  Y_TWICE(nbdserve_cas_rename(i_cas, "c", "d"));
  Y_TWICE(nbdserve_cas_seal(i_cas, "v@s", id, NULL, NULL));
  Y_TWICE(nbdserve_cas_seal(i_cas, "v@s", again, NULL, NULL));
  CHECK(!strcmp(id, again));
  for (n = 30000; n < 39000; n++)
    y_model[n] ^= 1;
  y_write(0, 30000, 9000);
  Y_TWICE(y_request(0, FLUSH, 0, 0, NULL));
  Y_TWICE((sum = 0, nbdserve_cas_diff(i_cas, "v", "v@s", y_adds, &sum)));
  CHECK(sum == 3 * 4096);
  Y_TWICE(y_import());
  Y_TWICE(nbdserve_cas_verify(i_cas, i_tell, NULL, NULL));
  Y_TWICE(nbdserve_cas_repair(i_cas, NULL, i_tell, NULL, NULL));
  Y_TWICE(nbdserve_cas_gc(i_cas, &sum, NULL, NULL));
  Y_TWICE((n = 0, nbdserve_cas_list(i_cas, y_counts, &n)));
  CHECK(n == 4);
  y_compare();
}

static void y_holds(const char *name, const unsigned char *data, uint32_t len) {
  struct nbdserve_export e = {0};
  CHECK(nbdserve_cas_volume(i_cas, name, &e) == 0 && e.size == len);
  CHECK(e.ops->read(e.ctx, y_got, 0, len, 0) == 0);
  CHECK(!memcmp(y_got, data, len));
  e.ops->close(e.ctx);
}

/* What was answered is there when the store is opened again; away with it, but
 * for v. */
static void y_reopened(void) {
  struct nbdserve_cas_stat stat;
  int n = 0;
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_list(i_cas, y_counts, &n) == 0 && n == 4);
  y_holds("v", y_model, y_size);
  y_holds("v@s", y_kept, y_size);
  y_holds("d", y_kept, 5000);
  y_holds("i", y_model, y_size);
  nbdserve_cas_stat(i_cas, &stat);
  CHECK(!stat.damaged && !nbdserve_cas_verify(i_cas, i_tell, NULL, NULL));
  CHECK(nbdserve_cas_rollback(i_cas, "v@s") == 0);
  y_holds("v", y_kept, y_size);
  CHECK(nbdserve_cas_rm(i_cas, "v@s") == 0);
  CHECK(nbdserve_cas_rm(i_cas, "d") == 0 && nbdserve_cas_rm(i_cas, "i") == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
}

static void i_starvedstore(void) {
  struct nbdserve_cas_options init = {0};
  struct nbdserve_config config = {0};
  int fired, n = 0, step = atoi(error_name);
  CHECK(step > 0);
  config.version = NBDSERVE_VERSION_NUMBER;
  config.find = y_find;
  config.list = y_list;
  init.log_pages = 16; /* it is full now and then */
  y_size = 1 << 18;
  y_mode = 2;
  fi_no_disk = 1;
  CHECK(nbdserve_cas_init(path, &init) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(nbdserve_cas_create(i_cas, "v", y_size) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  do {
    y_arm(n += step);
    Y_TWICE(nbdserve_cas_open(path, NULL, &i_cas));
    y_start(&config);
    y_requests(n);
    y_commands();
    y_stop();
    Y_TWICE(nbdserve_cas_close(i_cas));
    fired = y_disarm();
    y_reopened();
  } while (fired);
  CHECK(n > 99);
}
#else
static void i_starvedstore(void) {}
static void i_gcfails(void) {}
static void i_mending(void) {}
static void i_sealed(void) {}
static void i_lostbase(void) {}
static void i_badlog(void) {}
static void i_slowgc(void) {}
static void i_rollback(void) {}
static void i_edges(void) {}
static void i_listed(void) {}
static void i_dryrun(void) {}
static void i_cutshort(void) {}
static void i_twice(void) {}
static void i_failed(void) {}
static void i_manylost(void) {}
static void i_lostpage(void) {}
static void i_reread(void) {}
static void i_nodigest(void) {}
static void i_outdated(void) {}
static void i_oldcopy(void) {}
static void i_records(void) {}
static void i_hidden(void) {}
static void i_badsector(void) {}
static void i_device(void) {}
static void i_newlog(void) {}
static void i_refused(void) {}
static void i_undone(void) {}
static void i_reserve(void) {}
static void i_lossfull(void) {}
static void i_halfthere(void) {}
static void i_numbers(void) {}
static void i_confirm(void) {}
static void i_otherleaf(void) {}
static void i_nodigests(void) {}
static void i_fields(void) {}
static void i_tinylog(void) {}
static void i_lastpage(void) {}
static void i_notclean(void) {}
static void i_nogrowth(void) {}
static void i_unpinned(void) {}
static void i_removed(void) {}
static void i_rotten(void) {}
static void i_sealtwo(void) {}
static void i_last(void) {}
static void i_one(void) {}
static void i_strict(void) {}
static void i_idread(void) {}
static void i_indexed(void) {}
static void i_notgood(void) {}
static void i_room(void) {}
static void i_pending(void) {}
static void i_digests(void) {}
static void i_group(void) {}
static void i_upper(void) {}
static void i_letter(void) {}
static void i_oddend(void) {}
static void i_noted(void) {}
static void i_alike(void) {}
static void i_closing(void) {}
static void i_nohole(void) {}
static void i_prefix(void) {}
static void i_waiting(void) {}
static void i_unsealed(void) {}
static void i_named(void) {}
static void i_newest(void) {}
static void i_regained(void) {}
static void i_passed(void) {}
static void i_sector(void) {}
static void i_inorder(void) {}
static void i_healed(void) {}
static void i_shared(void) {}
static void i_anew(void) {}
static void i_misled(void) {}
static void i_future(void) {}
static void i_gaps(void) {}
static void i_freed(void) {}
static void i_trimmed(void) {}
static void i_nowhere(void) {}
static void i_offsets(void) {}
static void i_underway(void) {}
static void i_woken(void) {}
static void i_away(void) {}
static void i_bounded_all(void) {}
static void i_given_up(void) {}
static void i_flush_storm(void) {}
static void i_going(void) {}
static void i_orphan(void) {}
static void i_seen(void) {}
static void i_alone(void) {}
static void i_zeroed(void) {}
static void i_awhile(void) {}
static void i_checked(void) {}
static void i_kept(void) {}
static void i_format(void) {}
static void i_replaced(void) {}
static void i_places(void) {}
static void i_ended(void) {}
static void i_again(void) {}
static void i_ahead(void) {}
static void i_beside(void) {}
static void i_vouched(void) {}
static void i_logfull(void) {}
static void i_unread(void) {}
#endif

#if !NBDSERVE_NO_CAS && !NBDSERVE_NO_CLIENT
/* ---- A store at the far end, while something fails here ------------------ */

static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  sha_256(0, p, NULL, n, sum, NULL);
}

/* Two snapshots of the same volume: in the second one two blocks of the second
 * leaf differ, of which one is that of another place. */
static void far_two(struct far two[2]) {
  uint64_t i;
  int k;
  for (k = 0; k < 2; k++) {
    far_make(two + k, 4096, 1016, 1030 * 4096 - 100);
    for (i = 0; i < two->blocks; i += i == 5 ? 1000 : 1)
      far_put(far_block(two + k, i), 8, 1 + i);
    if (k) far_put(far_block(two + k, 1010), 8, 7777);
    if (k) far_put(far_block(two + k, 1020), 8, 7778);
    if (k) far_put(far_block(two + k, 1024), 8, 3);
    far_seal(two + k);
  }
}

static int far_pull(const char *name, const struct far *far, size_t left) {
  struct far_end end = {.left = left};
  struct nbdserve_peer peer = {.stall_ms = 20000};
  int err;
  peer.in_fd = peer.out_fd = far_start(&end, far);
  err = nbdserve_cas_pull(i_cas, name, far->id, &peer);
  far_stop(&end, peer.in_fd);
  return err;
}

static int far_tell(void *arg, const char *name, uint64_t off, uint64_t len,
                    const char *why) {
  (void)off, (void)len, (void)name, (void)why;
  ++*(int *)arg;
  return 0;
}

/* The snapshot of that name has that id and these contents; then it goes. */
static void far_has(const char *name, const struct far *far) {
  struct nbdserve_export e = {0};
  unsigned char *b = malloc((size_t)far->size);
  char id[72];
  int told = 0;
  CHECK(b && nbdserve_cas_verify(i_cas, far_tell, NULL, &told) == 0 && !told);
  CHECK(nbdserve_cas_seal(i_cas, name, id, NULL, NULL) == 0);
  CHECK(!strcmp(id, far->id));
  CHECK(nbdserve_cas_volume(i_cas, name, &e) == 0 && e.size == far->size);
  CHECK(e.ops->read(e.ctx, b, 0, far->size, 0) == 0);
  CHECK(!memcmp(b, far->b + far->data, (size_t)far->size));
  e.ops->close(e.ctx);
  free(b);
  CHECK(nbdserve_cas_rm(i_cas, name) == 0);
}

/* A store with v and v@a, the first of two; open, as is v */
static void far_new(struct far two[2]) {
  alarm(100);
  fi_no_disk = 1;
  unlink(path);
  CHECK(nbdserve_cas_init(path, NULL) == 0);
  CHECK(nbdserve_cas_open(path, NULL, &i_cas) == 0);
  CHECK(far_pull("v@a", two, SIZE_MAX) == 0);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  CHECK(i_cas_open(0) == 0);
}

/* After a pull of v@b that met a failure and ended with err: nothing of it, and
 * the next one ends in order; or it is there.  failed: so it may be after an
 * error, too, if nothing could be written any more. */
static void far_after(struct far two[2], int err, int failed) {
  struct nbdserve_export e = {0};
  int told = 0, there = nbdserve_cas_volume(i_cas, "v@b", &e);
  if (!there) e.ops->close(e.ctx);
  CHECK(there == (err ? -ENOENT : 0) || (!there && failed));
  if (there) {
    CHECK(nbdserve_cas_verify(i_cas, far_tell, NULL, &told) == 0 && !told);
    CHECK(far_pull("v@b", two + 1, SIZE_MAX) == 0);
  }
  far_has("v@b", two + 1);
}

/* Each allocation of a pull may fail, of one with a base and of one that is
 * gone on with: -ENOMEM, nothing leaks, and the next one ends with the id. */
static void i_farmemory(void) {
  struct far two[2];
  int n = 0, fired, fails = 0;
  far_two(two);
  far_new(two);
  do {
    int err;
    if (n % 4 == 3) CHECK(far_pull("v@b", two + 1, 30000) == -EPIPE);
    fi[MALLOC].calls = 0;
    fi[MALLOC].bad = ++n;
    err = far_pull("v@b", two + 1, SIZE_MAX);
    fired = fi_calls(MALLOC, 0) >= n;
    fi[MALLOC].bad = 0;
    CHECK(!err || (err == -ENOMEM && fired));
    fails += err != 0;
    cas_check(i_cas, fired ? CK_LENIENT : 0);
    far_after(two, err, 0);
    i_lenient = 1;
    if (n % 16 == 0) CHECK(i_cas_close() == 0 && i_cas_open(0) == 0);
  } while (fired);
  CHECK(n > 30 && fails > n / 2);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

/* A call that fails once, for each of them, in a pull */
static void i_farcalls(void) {
  static const int kinds[] = {PREAD, PWRITE, SYNC, FALLOCATE};
  static const int errors[] = {EIO, ENOSPC};
  struct far two[2];
  int k, i, n, fired, fails = 0, all = 0;
  far_two(two);
  far_new(two);
  i_lenient = 1;
  for (k = 0; k < COUNT(kinds); k++)
    for (i = 0; i < COUNT(errors); i++) {
      if (kinds[k] == PREAD && errors[i] != EIO) continue;
      for (n = 0, fired = 1; fired; n++, all++) {
        int err, failed;
        pthread_mutex_lock(&fi_lock);
        fi[kinds[k]].skip = n;
        fi[kinds[k]].err = errors[i];
        fi[kinds[k]].times = 1;
        pthread_mutex_unlock(&fi_lock);
        err = far_pull("v@b", two + 1, SIZE_MAX);
        pthread_mutex_lock(&fi_lock);
        fired = !fi[kinds[k]].times;
        fi[kinds[k]].times = fi[kinds[k]].skip = 0;
        pthread_mutex_unlock(&fi_lock);
        CHECK(!err || fired);
        CHECK(!err || err == -errors[i] || err == -EIO);
        fails += err != 0;
        failed = i_cas->failed;
        if (failed || n % 8 == 0) {
          CHECK(i_cas_close() == (failed ? failed : 0));
          CHECK(i_cas_open(0) == 0);
        }
        far_after(two, err, failed);
      }
      CHECK(n > (kinds[k] == FALLOCATE ? 0 : 2));
    }
  CHECK(fails > 10 && all > fails);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

/* The same in a repair: what was there is there, and the next one mends all. */
static void i_farmend(void) {
  static const int kinds[] = {PREAD, PWRITE, SYNC, MALLOC};
  struct far two[2];
  unsigned char b[4096];
  off_t at[8], pos;
  int k, n, i, fired, fd, found = 0, all = 0;
  far_two(two);
  far_new(two);
  i_lenient = 1;
  CHECK((fd = open(path, O_RDWR)) >= 0);
  for (pos = 0; found < 7 && pread(fd, b, 4096, pos) == 4096; pos += 4096)
    if (far_get(b, 8) > 1 && far_get(b, 8) < 2000 && far_is_zero(b + 8, 4088))
      at[found++] = pos;
  CHECK(found >= 5);
  for (k = 0; k < COUNT(kinds); k++)
    for (n = 1, fired = 1; fired; n++, all++) {
      struct far_end end[2] = {{.fd = 0}, {.fd = 0}};
      int round, err = 0, told, failed;
      for (i = 0; i < found; i++)
        i_flip(at[i] + 100 + i);
      for (round = 0; round < 2; round++) {
        struct nbdserve_peer peer = {.stall_ms = 20000};
        told = 0;
        peer.in_fd = peer.out_fd = far_start(end + round, two);
        pthread_mutex_lock(&fi_lock);
        if (!round && kinds[k] == MALLOC) {
          fi[MALLOC].calls = 0;
          fi[MALLOC].bad = n;
        } else if (!round) {
          fi[kinds[k]].skip = n - 1;
          fi[kinds[k]].err = EIO;
          fi[kinds[k]].times = 1;
        }
        pthread_mutex_unlock(&fi_lock);
        err = nbdserve_cas_repair(i_cas, &peer, far_tell, NULL, &told);
        pthread_mutex_lock(&fi_lock);
        if (!round)
          fired =
              kinds[k] == MALLOC ? fi[MALLOC].calls >= n : !fi[kinds[k]].times;
        fi[kinds[k]].times = fi[kinds[k]].skip = 0;
        fi[MALLOC].bad = 0;
        pthread_mutex_unlock(&fi_lock);
        far_stop(end + round, peer.in_fd);
        if (round) break;
        CHECK(!err || fired);
        failed = i_cas->failed;
        if (!failed && n % 8) continue;
        CHECK(i_cas_close() == (failed ? failed : 0));
        CHECK(i_cas_open(0) == 0);
      }
      CHECK(err == 0 && !told);
      CHECK(nbdserve_cas_verify(i_cas, far_tell, NULL, &told) == 0 && !told);
    }
  close(fd);
  CHECK(all > 20);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

static void *far_rm(void *id) {
  return (void *)(intptr_t)nbdserve_cas_rm(i_cas, id);
}

static void *far_again(void *far) {
  return (void *)(intptr_t)far_pull("v@b", far, SIZE_MAX);
}

/* A part of what was pulled is removed, which takes a while; who wants to go on
 * with it meanwhile begins anew. */
static void i_farremoved(void) {
  struct far two[2];
  pthread_t rm, pull;
  void *removed, *pulled;
  far_two(two);
  far_new(two);
  CHECK(far_pull("v@b", two + 1, 30000) == -EPIPE);
  t_hold(&fi[SYNC].hold, 1);
  CHECK(pthread_create(&rm, NULL, far_rm, two[1].part) == 0);
  usleep(100000);
  CHECK(pthread_create(&pull, NULL, far_again, two + 1) == 0);
  usleep(100000);
  t_hold(&fi[SYNC].hold, 0);
  pthread_join(rm, &removed);
  pthread_join(pull, &pulled);
  CHECK((int)(intptr_t)removed == 0);
  CHECK((int)(intptr_t)pulled == 0);
  far_has("v@b", two + 1);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

/* A part of what was pulled is removed by its id, though a snapshot was sealed
 * that has the same id. */
static void i_farsameid(void) {
  struct far two[2];
  char id[72];
  far_two(two);
  far_new(two);
  CHECK(far_pull("v@b", two + 1, 30000) == -EPIPE);
  CHECK(i_volume.ops->write(i_volume.ctx, two[1].b + two[1].data, 0,
                            two[1].size, 0) == 0);
  CHECK(nbdserve_cas_snapshot(i_cas, "v@c") == 0);
  CHECK(nbdserve_cas_seal(i_cas, "v@c", id, NULL, NULL) == 0);
  CHECK(!strcmp(id, two[1].id));
  CHECK(far_pull("v@b", two + 1, SIZE_MAX) == 0);
  CHECK(nbdserve_cas_rm(i_cas, two[1].part) == 0);
  CHECK(nbdserve_cas_rm(i_cas, two[1].part) == -ENOENT);
  CHECK(nbdserve_cas_rm(i_cas, two[1].id) == -EINVAL); /* two snapshots */
  CHECK(nbdserve_cas_rm(i_cas, "v@c") == 0);
  far_has("v@b", two + 1);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

/* As far_two, but with three leaves: in the second snapshot the first one is
 * empty, and there is less in the last one. */
static void far_thinner(struct far two[2]) {
  uint64_t i;
  int k;
  for (k = 0; k < 2; k++) {
    far_make(two + k, 4096, 1016, 2046 * 4096 - 100);
    for (i = k ? 1016 : 0; i < two->blocks; i += i % 1016 == 13 ? 1003 : 1)
      far_put(far_block(two + k, i), 8, 1 + i);
    if (k) far_put(far_block(two + k, 2034), 8, 0);
    if (k) far_put(far_block(two + k, 2036), 8, 7777);
    far_seal(two + k);
  }
}

/* The volume, visible or not, that is called so in the record that it has now,
 * or will have.  (locks) */
static struct cas_volume *far_named(const char *name) {
  uint32_t i;
  for (i = 0; i < i_cas->nvolumes; i++)
    if (!strcmp(i_cas->volumes[i]->then.name, name)) return i_cas->volumes[i];
  return NULL;
}

/* Waits until a volume of that name has pins, or is staged. */
static void far_await(const char *name, int staged) {
  int i, there = 0;
  for (i = 0; i < 2000 && !there; i++) {
    const struct cas_volume *vol;
    os_lock(&i_cas->lock);
    vol = far_named(name);
    there = vol && (staged ? vol->is_staged : vol->pins > 0);
    os_unlock(&i_cas->lock);
    usleep(5000);
  }
  CHECK(there);
}

/* Progress of a verify: what it reads behind the first leaf is on hold. */
static int far_slows(void *arg, uint64_t done, uint64_t total) {
  int *slows = arg;
  (void)done, (void)total;
  if (!*slows) return 0;
  pthread_mutex_lock(&fi_lock);
  fi_slow = pthread_self();
  fi_is_slow = 1;
  pthread_mutex_unlock(&fi_lock);
  *slows = 0;
  t_hold(&fi[PREAD].hold, 1);
  return 0;
}

static int far_told(void *arg, const char *name, uint64_t off, uint64_t len,
                    const char *why) {
  (void)arg;
  fprintf(stderr, "told: %s %llu %llu %s\n", name, (unsigned long long)off,
          (unsigned long long)len, why);
  return -EPROTO;
}

static void *far_verify(void *slows) {
  return (void *)(intptr_t)nbdserve_cas_verify(i_cas, far_told, far_slows,
                                               slows);
}

/* While verify reads what was pulled so far, which nobody else has, the pull
 * comes to its end: what it has pulled into goes when verify has let go of it.
 * Nothing is told. */
static void i_farpinned(void) {
  struct far two[2];
  pthread_t verify, pull;
  void *verified, *pulled;
  struct nbdserve_export e = {0};
  int slows = 1;
  far_thinner(two);
  far_new(two);
  CHECK(far_pull("v@b", two + 1, 26000) == -EPIPE);
  i_volume.ops->close(i_volume.ctx);
  CHECK(nbdserve_cas_rm(i_cas, "v@a") == 0);
  CHECK(nbdserve_cas_rm(i_cas, "v") == 0);
  CHECK(pthread_create(&verify, NULL, far_verify, &slows) == 0);
  far_await(two[1].part, 0);
  CHECK(pthread_create(&pull, NULL, far_again, two + 1) == 0);
  far_await("b", 1);
  usleep(100000);
  CHECK(nbdserve_cas_volume(i_cas, "v@b", &e) == -ENOENT);
  far_await(two[1].part, 0);
  t_hold(&fi[PREAD].hold, 0);
  pthread_join(verify, &verified);
  pthread_join(pull, &pulled);
  CHECK((int)(intptr_t)verified == 0);
  CHECK((int)(intptr_t)pulled == 0);
  far_has("v@b", two + 1);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  far_free(two);
  far_free(two + 1);
}

/* Progress of a repair, before the last leaf and then while the peer is waited
 * for: now v goes. */
static int far_goes(void *arg, uint64_t done, uint64_t total) {
  (void)total;
  if (done == 1016 * 4096 && ++*(int *)arg == 2)
    CHECK(nbdserve_cas_rm(i_cas, "v") == 0);
  return 0;
}

/* A volume is removed while the peer is asked for its last blocks. */
static void i_fargoes(void) {
  struct far two[2];
  struct far_end end = {.sleeps = 500};
  struct nbdserve_peer peer = {.stall_ms = 20000};
  unsigned char b[4096];
  off_t pos;
  int looks = 0, err;
  far_two(two);
  far_new(two);
  CHECK(nbdserve_cas_rm(i_cas, "v@a") == 0);
  i_volume.ops->close(i_volume.ctx);
  for (pos = 0;; pos += 4096) {
    i_peek(pos, b, sizeof b);
    if (!memcmp(b, far_block(two, 1027), sizeof b)) break;
  }
  i_flip(pos + 100);
  peer.in_fd = peer.out_fd = far_start(&end, two);
  err = nbdserve_cas_repair(i_cas, &peer, far_told, far_goes, &looks);
  far_stop(&end, peer.in_fd);
  CHECK(err == 0 && looks > 1);
  CHECK(nbdserve_cas_close(i_cas) == 0);
  far_free(two);
  far_free(two + 1);
}

/* Progress of a pull: there is a checkpoint when it seals the map and looks at
 * the first leaf or, if that is not there any more, the last one; that it looks
 * at for the second time, after it has found out what it lacks. */
static int far_thins(void *arg, uint64_t done, uint64_t total) {
  int *looks = arg;
  if (done == 1016 * 4096 || (done && done == total && ++looks[0] > 1)) {
    looks[1]++;
    CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  }
  return 0;
}

/* A leaf of which nothing is left goes with a checkpoint, but not while a pull
 * seals the map. */
static void i_farthinned(void) {
  struct far two[2];
  struct far_end end = {.left = SIZE_MAX};
  struct nbdserve_peer peer = {.stall_ms = 20000, .progress = far_thins};
  int looks[2] = {0, 0};
  far_thinner(two);
  far_new(two);
  peer.arg = looks;
  peer.in_fd = peer.out_fd = far_start(&end, two + 1);
  CHECK(nbdserve_cas_pull(i_cas, "v@b", two[1].id, &peer) == 0);
  far_stop(&end, peer.in_fd);
  CHECK(looks[1] > 0);
  far_has("v@b", two + 1);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}

/* Others, until the end of `on` */
struct far_others {
  int on; /* (t_hold) */
  int rounds;
};

/* Verify tells nothing, whatever the others do. */
static void *far_verifies(void *arg) {
  struct far_others *o = arg;
  for (; t_hold(&o->on, -1); o->rounds++)
    CHECK(nbdserve_cas_verify(i_cas, far_told, NULL, NULL) == 0);
  return NULL;
}

/* Checkpoints, one after the other */
static void *far_cuts(void *arg) {
  struct far_others *o = arg;
  for (; t_hold(&o->on, -1); o->rounds++)
    CHECK(cas_checkpoint(i_cas, NULL, UINT64_MAX) == 0);
  return NULL;
}

/* Removes what may be the base of a seal or a pull. */
static void far_remove(const char *name) {
  int err;
  while ((err = nbdserve_cas_rm(i_cas, name)) == -EBUSY)
    usleep(1000);
  CHECK(err == 0);
}

/* Snapshots of v, of which leaves come and go meanwhile, are sealed. */
static void *far_seals(void *arg) {
  struct far_others *o = arg;
  char id[2][72];
  for (; t_hold(&o->on, -1); o->rounds++) {
    uint64_t leaf = (uint64_t)(o->rounds % 3) * 1016;
    int i;
    for (i = 0; i < 9; i++)
      CHECK(i_put(leaf + (uint64_t)i, 1 + i) == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@c") == 0);
    CHECK(i_volume.ops->zero(i_volume.ctx, leaf * 4096, 9 * 4096, 0) == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@c", id[0], NULL, NULL) == 0);
    CHECK(nbdserve_cas_snapshot(i_cas, "v@d") == 0);
    CHECK(nbdserve_cas_seal(i_cas, "v@d", id[1], NULL, NULL) == 0);
    CHECK(strcmp(id[0], id[1]));
    far_remove("v@c");
    far_remove("v@d");
  }
  return NULL;
}

/* Pulls that come to their end, seals, checkpoints and a verify side by side */
static void i_farbeside(void) {
  static void *(*const all[])(void *) = {far_verifies, far_cuts, far_seals};
  struct far_others o[3] = {{1, 0}, {1, 0}, {1, 0}};
  pthread_t thread[3];
  time_t from = time(NULL);
  struct far two[2];
  char id[72];
  int i, k;
  far_thinner(two);
  far_new(two);
  for (k = 0; k < 3; k++)
    CHECK(pthread_create(thread + k, NULL, all[k], o + k) == 0);
  for (i = 0; i < 30 && (i < 6 || time(NULL) - from < 10); i++) {
    const char *name = i % 2 ? "v@b" : "w@b"; /* with a base, and without */
    if (i % 3) CHECK(far_pull(name, two + 1, 26000) == -EPIPE);
    CHECK(far_pull(name, two + 1, SIZE_MAX) == 0);
    CHECK(nbdserve_cas_seal(i_cas, name, id, NULL, NULL) == 0);
    CHECK(!strcmp(id, two[1].id));
    far_remove(name);
    if (i % 2 == 0) far_remove("w");
  }
  for (k = 0; k < 3; k++) {
    t_hold(&o[k].on, 0);
    pthread_join(thread[k], NULL);
    CHECK(o[k].rounds > 0);
  }
  far_has("v@a", two);
  CHECK(i_cas_close() == 0);
  far_free(two);
  far_free(two + 1);
}
#else
static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  memset(sum, p && n ? 1 : 0, 32);
}
static void i_farmemory(void) {}
static void i_farcalls(void) {}
static void i_farmend(void) {}
static void i_farremoved(void) {}
static void i_farsameid(void) {}
static void i_farpinned(void) {}
static void i_fargoes(void) {}
static void i_farthinned(void) {}
static void i_farbeside(void) {}
#endif

static const struct {
  const char *name;
  void (*run)(void);
} i_verbs[] = {
    {"sync", i_sync},
    {"shrunk", i_shrunk},
    {"full", i_full},
    {"short", i_short},
    {"read", i_read},
    {"halfway", i_halfway},
    {"half", i_half},
    {"slow", i_slow},
    {"whole", i_whole},
    {"awayreads", i_away_reads},
    {"goneawayreads", i_gone_away_reads},
    {"bounded", i_bounded_all},
    {"givenup", i_given_up},
    {"flushes", i_flush_storm},
    {"going", i_going},
    {"orphan", i_orphan},
    {"fallocate", i_fallocate},
    {"fastzero", i_fastzero},
    {"threads", i_threads},
    {"stale", i_stale},
    {"memory", i_memory},
    {"readonly", i_readonly},
    {"create", i_create},
    {"syncrun", i_syncrun},
    {"nameless", i_nameless},
    {"fua", i_fua},
    {"export", i_export},
    {"loopbacks", i_loopbacks},
    {"keepalive", i_keepalive},
    {"scarce", i_scarce},
    {"badlog", i_badlog},
    {"slowgc", i_slowgc},
    {"overlay", i_overlay},
    {"rollback", i_rollback},
    {"edges", i_edges},
    {"listed", i_listed},
    {"dryrun", i_dryrun},
    {"cutshort", i_cutshort},
    {"twice", i_twice},
    {"failed", i_failed},
    {"manylost", i_manylost},
    {"lostpage", i_lostpage},
    {"reread", i_reread},
    {"nodigest", i_nodigest},
    {"outdated", i_outdated},
    {"oldcopy", i_oldcopy},
    {"records", i_records},
    {"hidden", i_hidden},
    {"badsector", i_badsector},
    {"device", i_device},
    {"newlog", i_newlog},
    {"refused", i_refused},
    {"undone", i_undone},
    {"reserve", i_reserve},
    {"closing", i_closing},
    {"nohole", i_nohole},
    {"sector", i_sector},
    {"inorder", i_inorder},
    {"healed", i_healed},
    {"shared", i_shared},
    {"anew", i_anew},
    {"misled", i_misled},
    {"future", i_future},
    {"gaps", i_gaps},
    {"unread", i_unread},
    {"passed", i_passed},
    {"regained", i_regained},
    {"newest", i_newest},
    {"named", i_named},
    {"unsealed", i_unsealed},
    {"waiting", i_waiting},
    {"prefix", i_prefix},
    {"starved", i_starved},
    {"starvedstore", i_starvedstore},
    {"gcfails", i_gcfails},
    {"mending", i_mending},
    {"sealed", i_sealed},
    {"freed", i_freed},
    {"alone", i_alone},
    {"zeroed", i_zeroed},
    {"awhile", i_awhile},
    {"checked", i_checked},
    {"kept", i_kept},
    {"trimmed", i_trimmed},
    {"nowhere", i_nowhere},
    {"offsets", i_offsets},
    {"underway", i_underway},
    {"woken", i_woken},
    {"away", i_away},
    {"seen", i_seen},
    {"lossfull", i_lossfull},
    {"halfthere", i_halfthere},
    {"numbers", i_numbers},
    {"confirm", i_confirm},
    {"otherleaf", i_otherleaf},
    {"nodigests", i_nodigests},
    {"fields", i_fields},
    {"tinylog", i_tinylog},
    {"lastpage", i_lastpage},
    {"removed", i_removed},
    {"rotten", i_rotten},
    {"alike", i_alike},
    {"sealtwo", i_sealtwo},
    {"noted", i_noted},
    {"last", i_last},
    {"one", i_one},
    {"strict", i_strict},
    {"idread", i_idread},
    {"indexed", i_indexed},
    {"notgood", i_notgood},
    {"room", i_room},
    {"pending", i_pending},
    {"digests", i_digests},
    {"group", i_group},
    {"upper", i_upper},
    {"letter", i_letter},
    {"oddend", i_oddend},
    {"lostbase", i_lostbase},
    {"logfull", i_logfull},
    {"notclean", i_notclean},
    {"nogrowth", i_nogrowth},
    {"unpinned", i_unpinned},
    {"vouched", i_vouched},
    {"beside", i_beside},
    {"ahead", i_ahead},
    {"again", i_again},
    {"ended", i_ended},
    {"places", i_places},
    {"replaced", i_replaced},
    {"format", i_format},
    {"farmemory", i_farmemory},
    {"farcalls", i_farcalls},
    {"farmend", i_farmend},
    {"farremoved", i_farremoved},
    {"farsameid", i_farsameid},
    {"farpinned", i_farpinned},
    {"fargoes", i_fargoes},
    {"farthinned", i_farthinned},
    {"farbeside", i_farbeside},
};

int main(int argc, char **argv) {
  int i;
  CHECK(argc > 2);
  alarm(30);
  path = argv[2];
  error_name = argc > 3 ? argv[3] : "";
  for (i = 0; i < COUNT(i_verbs); i++)
    if (!strcmp(argv[1], i_verbs[i].name)) {
      i_verbs[i].run();
      return 0;
    }
  return 2;
}

//== simulator
/* Defends "power cut, kill -9: what was flushed, or written with FUA, is there"
 * and "disk full", "write or fsync error" for stores, in thousands of
 * histories: a disk in memory, whose writes last only after a sync, and a model
 * of what the store on it must hold.  One thread: the store's own are run in
 * between, as calls.  Everything follows from the seed.
 *
 * Each history is of one kind of trouble (enum kind), besides the cuts.  After
 * each cut the store must open for writing, whatever the kind. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* A store so small that deep maps, groups and a full log are everyday things */
#define CAS_ENTRIES d_entries
#define CAS_RESERVE_PAIRS 12 /* format 2: pairs of slots that are kept back */
#define CAS_UNIT 4096
#define CAS_FANOUT(bs) 8
#define CAS_SEGMENT 16
#define CAS_MAX_DIRTY 400
#define CAS_MARGIN 8
#define CAS_TRIES 12 /* 8 segments have their digests in one sector */
#define CAS_MIN_BLOCK 512
#define PEER_ALIGN 512 /* where blocks begin, too */

enum {
  PREAD,
  PWRITE,
  PREADV,
  PWRITEV,
  SYNC,
  FSYNC,
  FALLOCATE,
  FTRUNCATE,
  MALLOC,
  NCALLS
};
enum {
  D_SIZE = 2 << 20,
  D_OPS = 8192,
  D_FD = 5000,
  D_DIR = 6000,
  D_PEER = 7000,
  D_UNIT = CAS_UNIT,
  D_SLOT = 512,           /* bytes of a slot */
  D_SLOTS = CAS_UNIT / 32 /* in a group, behind their digests */
};
enum kind {
  PLAIN,    /* cuts and kills */
  FULL,     /* there is less space than the volumes could take */
  SCARCE,   /* for a while writes are refused, with ENOSPC */
  TAKEN,    /* after a cut others have taken all space that was not allocated */
  LOSTPAGE, /* the disk loses one write of a page, maybe its digest, too */
  SECTOR,   /* after a cut a sector cannot be read, or has rotted */
  SUPER,    /* the same, in one of the superblocks */
  KILLED,   /* kill -9 only: all that was acknowledged is there */
  PEER,     /* snapshots are pulled, and what has rotted is mended by a peer */
  NKINDS
};
enum {
  POWER = 6,
  KILL = 6
}; /* (d_cut) */

static unsigned char d_now[D_SIZE], d_durable[D_SIZE], d_data[2 * D_SIZE];
static enum kind d_kind;
static uint64_t d_size, d_durable_size, d_limit; /* d_limit: all there is */
static int d_device;      /* it is a block device, of d_limit bytes */
static int d_nofallocate; /* it is on a file system without fallocate */
static uint64_t d_meta;   /* where data starts */
static size_t d_used;     /* of d_data: what was written since the last sync, */
static int d_nops;        /* in this many calls; without length: a new size */
static struct {
  uint64_t off, len;
  size_t data;
} d_ops[D_OPS];
static int d_exists, d_entered; /* the file; its directory entry lasts */
static int d_loses;             /* what it is writing when the power is cut, */
static int d_lost_super[2];     /* and that is a superblock, */
static int d_gone_super;        /* this one, counted from 1 */
static int d_fds, d_locked, d_frozen, d_full; /* d_full: no room was met */
static long d_fuse; /* this many changes until the power is cut; 0: never */
static int d_aim;   /* rather when the superblock is written */
static jmp_buf d_out;
static long d_calls[NCALLS], d_writes;
static struct {
  int kind, err;
  long nth;
  size_t cut;
  int fired;
  long step; /* in which it fired */
} d_fault;
static int d_stopped; /* a sync failed, or a write of log or superblock */

/* TAKEN: which pieces of the file have space, and how many more may get it */
static uint32_t d_piece; /* bytes of a piece */
static unsigned char d_has[D_SIZE / 512], d_has_durable[D_SIZE / 512];
static uint32_t d_pool;  /* pieces that are free */
static uint32_t d_taken; /* that somebody else has now, and will give back */

/* SCARCE: which writes behind the log are refused */
static struct {
  long n;    /* each n-th */
  long from; /* the first */
  long to;   /* the one behind the last */
} d_scarce;
static long d_asked, d_refused; /* such writes so far; how many were refused */

/* LOSTPAGE: pages begin with one of these.  The disk forgets what it was given
 * when the process ends: until then it may be read from memory. */
static const char d_letters[][5] = {"MAP1", "CAT1", "MAP2", "CAT2",
                                    "REC1", "REC2", "SUM1", "SUM2"};
static long d_lose;       /* so many page writes on, one is lost; 0: none */
static int d_lose_digest; /* together with the digest that goes with it */
static int d_hw;          /* the processor computes SHA-256 */
static int64_t d_expect;  /* the digest that is to be lost when written, or 0 */
static struct {
  uint64_t off;
  size_t len; /* 0: nothing */
  unsigned char was[D_SLOT];
} d_gone[2];
static unsigned char d_digests[D_SIZE / D_SLOT][32]; /* what was there before */
static long d_when[D_SIZE / D_SLOT], d_syncs; /* after how many syncs it went */

/* SECTOR, SUPER: what cannot be read until it is written as a whole */
static struct {
  uint64_t off, len; /* len 0: none */
  int passes;        /* after the next cut it can be read again */
} d_bad[2];

static long m_nth; /* the step that the model is in */
static void *(*d_thread)(void *), *d_thread_arg;
static union d_head {
  union d_head *next[2];
  double align;
} d_heap;
static uint64_t d_seed;
static unsigned d_entries; /* of a log page: few, so that they are common */

static void m_fail(const char *format, ...);

static uint32_t rnd(uint32_t n) { /* 0..n-1 */
  d_seed ^= d_seed << 13, d_seed ^= d_seed >> 7, d_seed ^= d_seed << 17;
  return (uint32_t)((d_seed * UINT64_C(0x2545f4914f6cdd1d)) >> 32) % n;
}

/* The slot whose digest (area 0) or data (1) is at an offset; -1: none */
static long d_slot(uint64_t off, int area) {
  uint64_t group = D_UNIT + D_SLOTS * D_SLOT, in;
  if (off < d_meta) return -1;
  in = (off - d_meta) % group;
  if ((in >= D_UNIT) != area) return -1;
  in = area ? (in - D_UNIT) / D_SLOT : in / 32;
  return (long)((off - d_meta) / group * D_SLOTS + in);
}

/* Where a slot's digest or data is */
static uint64_t d_at(long x, int area) {
  uint64_t group = D_UNIT + D_SLOTS * D_SLOT, in = (uint64_t)x % D_SLOTS;
  in = area ? D_UNIT + in * D_SLOT : in * 32;
  return d_meta + (uint64_t)x / D_SLOTS * group + in;
}

/* Gives a range of the file space as far as there is some: how much of it has
 * space then. */
static size_t d_allocate(uint64_t off, size_t len) {
  uint64_t p, end = off + len;
  if (d_kind != TAKEN) return len;
  for (p = off / d_piece; p * d_piece < end; p++) {
    if (!d_has[p] && !d_pool)
      return p * d_piece > off ? (size_t)(p * d_piece - off) : 0;
    if (!d_has[p]) d_pool--;
    d_has[p] = 1;
  }
  return len;
}

/* How many pieces of a range have no space */
static uint32_t d_lacks(uint64_t off, uint64_t len) {
  uint32_t n = 0;
  uint64_t p;
  for (p = off / d_piece; p * d_piece < off + len; p++)
    n += !d_has[p];
  return n;
}

/* Takes the space from whole pieces of a range. */
static void d_punch(uint64_t off, uint64_t len) {
  uint64_t p = (off + d_piece - 1) / d_piece;
  for (; d_kind == TAKEN && (p + 1) * d_piece <= off + len; p++) {
    d_pool += d_has[p];
    d_has[p] = 0;
  }
}

/* After a cut: space that was given or taken since the last sync may be so or
 * not, except that what has data has space. */
static void d_cut_space(void) {
  uint64_t p, i;
  for (p = 0; d_kind == TAKEN && p < D_SIZE / d_piece; p++) {
    int has = rnd(2) ? d_has[p] : d_has_durable[p];
    for (i = p * d_piece; !has && i < (p + 1) * d_piece; i++)
      has = d_durable[i] != 0;
    if (p * d_piece >= d_durable_size) has = 0;
    d_pool += d_has[p];
    d_pool -= (uint32_t)has; /* which may be more than the others left: then */
    if (d_pool > D_SIZE) d_pool = 0; /* they must have had it */
    d_has[p] = d_has_durable[p] = (unsigned char)has;
  }
}

/* Brings to the medium, of each piece, what the calls before limit[] made it
 * (NULL: everything), and the sizes up to call sizes. */
static void d_settle(const int *limit, uint64_t piece, int sizes) {
  uint64_t at, end, next;
  int i;
  for (i = 0; i < d_nops; i++) {
    end = d_ops[i].off + d_ops[i].len;
    if (!d_ops[i].len && i < sizes) {
      if (end < d_durable_size)
        memset(d_durable + end, 0, (size_t)(d_durable_size - end));
      d_durable_size = end;
    }
    for (at = d_ops[i].off; at < end; at = next) {
      next = limit ? (at / piece + 1) * piece : end;
      if (next > end) next = end;
      if (limit && i >= limit[at / piece]) continue;
      memcpy(d_durable + at, d_data + d_ops[i].data + (at - d_ops[i].off),
             (size_t)(next - at));
      if (next > d_durable_size) d_durable_size = next;
    }
  }
  d_used = 0;
  d_nops = 0;
  if (!limit && d_kind == TAKEN) memcpy(d_has_durable, d_has, sizeof d_has);
}

/* The process ends: what the disk was given and has lost is as it was. */
static void d_lost(void) {
  int i;
  for (i = 0; i < 2; i++) {
    if (!d_gone[i].len) continue;
    d_settle(NULL, 1, D_OPS); /* of calls before the next end nothing is left */
    memcpy(d_now + d_gone[i].off, d_gone[i].was, d_gone[i].len);
    memcpy(d_durable + d_gone[i].off, d_gone[i].was, d_gone[i].len);
    d_gone[i].len = 0;
  }
  d_lose = 0;
  d_expect = 0;
}

/* A disk may lose the sectors that it is writing when the power goes, not only
 * leave them as they were: of a superblock all of it.  So the two must never be
 * under way together.  Not in all histories, so that those which are known to
 * find something are what they were. */
static void d_cut_supers(void) {
  int i, place;
  for (place = 0; place < 2; place++)
    for (i = 0; i < d_nops && d_loses; i++)
      if (d_ops[i].len == 4096 && d_ops[i].off == (uint64_t)place * CAS_UNIT)
        d_lost_super[place] = 1;
}

/* What is left after a cut: none, all, metadata or data of what was not synced,
 * some of its pieces of 512 or 4096 bytes (POWER: one of these); KILL: all can
 * be read, and still gets lost in the next one. */
static void d_cut(int how) {
  static int limit[D_SIZE / 512];
  uint64_t piece = how == 4 ? 512 : 4096, i;
  int kept = (int)rnd(101), n = d_nops;
  d_gone_super = 0;
  if (how == KILL) return;
  d_cut_supers();
  for (i = 0; i < D_SIZE / piece; i++)
    limit[i] = how == 0   ? 0
               : how == 1 ? n
               : how < 4  ? (i * piece < d_meta) == (how == 2) ? n : 0
               : (int)rnd(100) < kept ? n
               : rnd(2)               ? 0
                                      : (int)rnd((uint32_t)n + 1);
  d_settle(limit, piece,
           how == 0   ? 0
           : how == 1 ? n
                      : (int)rnd((uint32_t)n + 1));
  for (i = 0; i < 2; i++)
    if (d_lost_super[i]) {
      /* What it begins with is being written, or was there: it is ours. */
      memcpy(d_durable + i * CAS_UNIT, "NBDSCAS2", 8);
      memset(d_durable + i * CAS_UNIT + 20, 0x55, 492);
    }
  for (i = 0; i < 2; i++)
    if (d_lost_super[i]) d_gone_super = (int)i + 1;
  memset(d_lost_super, 0, sizeof d_lost_super);
  memcpy(d_now, d_durable, D_SIZE);
  d_size = d_durable_size;
  d_cut_space();
  if (!d_entered && rnd(2)) d_exists = 0;
}

/* Before each call: does it fail, or do less? */
static int d_enter(int kind, int fd, size_t *len) {
  if (fd != D_DIR && (fd < D_FD || fd >= D_DIR))
    m_fail("a call for descriptor %d", fd);
  d_calls[kind]++;
  if (kind != PREAD && kind != PREADV && kind != MALLOC && d_frozen)
    m_fail("a read-only store is changed");
  if (kind != d_fault.kind || d_calls[kind] != d_fault.nth) return 0;
  d_fault.fired = 1;
  d_fault.step = m_nth;
  errno = d_fault.err;
  if (!errno && len && *len > d_fault.cut) *len = d_fault.cut;
  return errno != 0;
}

static void d_changed(void) {
  if (d_fuse && !--d_fuse) longjmp(d_out, 1);
}

/* Changes n bytes at off, p: to what, NULL: zeroes, n = 0: the size is off */
static void d_change(const void *p, size_t n, uint64_t off) {
  if (d_nops == D_OPS || d_used + n > sizeof d_data || rnd(300) == 0)
    d_settle(NULL, 1, D_OPS); /* the system may do that at any time */
  d_ops[d_nops].off = off;
  d_ops[d_nops].len = n;
  d_ops[d_nops++].data = d_used;
  if (p && n)
    memcpy(d_data + d_used, p, n);
  else
    memset(d_data + d_used, 0, n);
  memcpy(d_now + off, d_data + d_used, n);
  d_used += n;
  if (!n && off < d_size) memset(d_now + off, 0, (size_t)(d_size - off));
  if (!n || off + n > d_size) d_size = off + n;
}

/* Is something of a range unreadable?  *len: how much is readable up to there;
 * writing: how much can be written; what is written as a whole is healed. */
static int d_rotten(int writing, uint64_t off, size_t *len) {
  int i;
  for (i = 0; i < 2; i++) {
    uint64_t from = d_bad[i].off, to = from + d_bad[i].len;
    if (from == to || off + *len <= from || off >= to) continue;
    if (writing && off <= from && off + *len >= to) {
      d_bad[i].len = 0;
      continue;
    }
    if (off >= from) return 1;
    *len = (size_t)(from - off);
  }
  return 0;
}

/* Is a write behind the log refused, with ENOSPC? */
static int d_refuse(uint64_t off) {
  if (off < d_meta || d_kind != SCARCE) return 0;
  d_asked++;
  if (d_asked < d_scarce.from || d_asked >= d_scarce.to || d_asked % d_scarce.n)
    return 0;
  d_refused++;
  errno = ENOSPC;
  return 1;
}

/* Takes note of what a range is, which is written now, but will be again. */
static void d_forget(int i, uint64_t off, size_t len, const void *was) {
  d_gone[i].off = off;
  d_gone[i].len = len;
  memcpy(d_gone[i].was, was, len);
}

/* A piece is written: a page may be the one that gets lost, and a digest that
 * of such a page. */
static void d_piece_written(const unsigned char *p, size_t len, uint64_t off) {
  long x = d_slot(off, 0);
  size_t i;
  int k;
  for (k = 0; k < 2; k++) /* what is written again is not lost any more */
    if (d_gone[k].len && off <= d_gone[k].off &&
        off + len >= d_gone[k].off + d_gone[k].len)
      d_gone[k].len = 0;
  for (i = 0; x >= 0 && i + 32 <= len; i += 32, x++) {
    if (d_expect == x && x) {
      d_forget(1, off + i, 32, d_now + off + i);
      d_expect = 0;
    }
    memcpy(d_digests[x], d_now + off + i, 32);
    d_when[x] = d_syncs;
  }
  x = d_slot(off, 1);
  for (k = 0; x > 0 && len >= 4 && k < (int)sizeof d_letters / 5; k++) {
    if (memcmp(p, d_letters[k], 4) || !d_lose || --d_lose) continue;
    d_forget(0, off, D_SLOT, d_now + off);
    if (d_lose_digest && d_when[x] == d_syncs)
      d_forget(1, d_at(x, 0), 32, d_digests[x]);
    else if (d_lose_digest)
      d_expect = x;
  }
}

static ssize_t d_read(int kind, int fd, const struct iovec *v, int n,
                      off_t off) {
  size_t len = 0, left, part;
  int i;
  for (i = 0; i < n; i++)
    len += v[i].iov_len;
  if (d_enter(kind, fd, &len)) return -1;
  if ((uint64_t)off >= d_size) return 0;
  if (len > d_size - (uint64_t)off) len = (size_t)(d_size - (uint64_t)off);
  if (d_rotten(0, (uint64_t)off, &len)) return errno = EIO, -1;
  for (left = len; left; v++, left -= part, off += (off_t)part) {
    part = left < v->iov_len ? left : v->iov_len;
    memcpy(v->iov_base, d_now + off, part);
  }
  return (ssize_t)len;
}

static ssize_t d_write(int kind, int fd, const struct iovec *v, int n,
                       off_t off) {
  static unsigned char b[D_SIZE], bad[sizeof d_bad];
  size_t len = 0, all = 0, whole;
  int i;
  for (i = 0; i < n; i++)
    len += v[i].iov_len;
  if (d_enter(kind, fd, &len)) {
    d_stopped |= (uint64_t)off < d_meta && errno != EINTR;
    return -1;
  }
  if (d_refuse((uint64_t)off)) return -1;
  memcpy(bad, d_bad, sizeof bad);
  if (d_rotten(1, (uint64_t)off, &len)) return errno = EIO, -1;
  whole = len;
  if (!off && d_fuse > 2 && d_aim && rnd(3) == 0) d_fuse = 1 + (long)rnd(2);
  if (d_fuse == 1 && rnd(2))
    len = len / 512 ? rnd((uint32_t)len / 512) * 512 : 0;
  if (len < whole) memcpy(d_bad, bad, sizeof bad); /* it heals nothing */
  if ((uint64_t)off >= d_limit || len > d_limit - (uint64_t)off) {
    d_full = 1;
    len = (uint64_t)off >= d_limit ? 0 : (size_t)(d_limit - (uint64_t)off);
    if (!len) return errno = ENOSPC, -1;
  }
  if (len && !(len = d_allocate((uint64_t)off, len)))
    return d_full = 1, errno = ENOSPC, -1;
  for (i = 0; i < n && all < len; all += v[i++].iov_len)
    memcpy(b + all, v[i].iov_base,
           v[i].iov_len < len - all ? v[i].iov_len : len - all);
  for (i = 0, all = 0; d_kind == LOSTPAGE && i < n; all += v[i++].iov_len)
    if (all + v[i].iov_len <= len)
      d_piece_written(v[i].iov_base, v[i].iov_len, (uint64_t)off + all);
  if (len) d_change(b, len, (uint64_t)off);
  d_writes++;
  d_changed();
  return (ssize_t)len;
}

static ssize_t sim_pread(int fd, void *b, size_t n, off_t off) {
  struct iovec v = {b, n};
  return d_read(PREAD, fd, &v, 1, off);
}

static ssize_t sim_pwrite(int fd, const void *b, size_t n, off_t off) {
  struct iovec v;
  v.iov_base = (void *)(uintptr_t)b;
  v.iov_len = n;
  return d_write(PWRITE, fd, &v, 1, off);
}

static ssize_t sim_preadv(int fd, const struct iovec *v, int n, off_t off) {
  return d_read(PREADV, fd, v, n, off);
}

static ssize_t sim_pwritev(int fd, const struct iovec *v, int n, off_t off) {
  return d_write(PWRITEV, fd, v, n, off);
}

static ssize_t sim_read(int fd, void *b, size_t n) { /* /dev/urandom */
  size_t i;
  (void)fd;
  for (i = 0; i < n; i++)
    ((char *)b)[i] = (char)rnd(256);
  return (ssize_t)n;
}

static int d_sync(int kind, int fd) {
  if (d_enter(kind, fd, NULL)) {
    if (errno != EINTR) d_nops = 0, d_used = 0; /* lost; the next succeeds */
    d_stopped |= errno != EINTR;
    return -1;
  }
  if (d_fuse == 1 && rnd(2)) longjmp(d_out, 1);
  if (fd == D_DIR)
    d_entered = 1;
  else
    d_settle(NULL, 1, D_OPS);
  d_syncs++;
  d_changed();
  return 0;
}

static int sim_fdatasync(int fd) {
  return d_sync(SYNC, fd);
}
static int sim_fsync(int fd) {
  return d_sync(FSYNC, fd);
}

static int sim_ftruncate(int fd, off_t size) {
  if (d_enter(FTRUNCATE, fd, NULL)) return -1;
  if ((uint64_t)size > d_limit) return errno = EFBIG, -1;
  d_change(NULL, 0, (uint64_t)size);
  d_changed();
  return 0;
}

/* Where the slots end that the last durable checkpoint counts.  Some file
 * systems, when they are full, refuse to give space that is there, and what is
 * there before that is what a store may rely on. */
static uint64_t d_counted(void) {
  const unsigned char *p = d_durable, *other = d_durable + CAS_UNIT;
  if (memcmp(p + 32, other + 32, 8) < 0) p = other; /* the newer one */
  long n = (long)p[52] << 24 | p[53] << 16 | p[54] << 8 | p[55];
  return n > 0 && n <= D_SIZE / D_SLOT ? (uint64_t)d_at(n - 1, 1) + D_SLOT : 0;
}

static int sim_fallocate(int fd, int mode, off_t off, off_t len) {
  uint64_t end = (uint64_t)(off + len);
  if (d_enter(FALLOCATE, fd, NULL)) return -1;
  if (d_nofallocate || (d_device && !mode)) return errno = EOPNOTSUPP, -1;
  if (end > d_limit) return d_full = 1, errno = ENOSPC, -1;
  if (!(mode & 2) && d_refuse((uint64_t)off)) return -1;
  if (d_kind == TAKEN && !(mode & 2)) {
    if (d_loses && !d_pool && end <= d_counted())
      return d_full = 1, errno = ENOSPC, -1;
    if (d_lacks((uint64_t)off, (uint64_t)len) > d_pool)
      return d_full = 1, errno = ENOSPC, -1;
    d_allocate((uint64_t)off, (size_t)len);
  }
  if ((mode & 2)) d_punch((uint64_t)off, (uint64_t)len);
  if ((mode & ~1) && end > d_size) end = d_size; /* PUNCH_HOLE, ZERO_RANGE */
  if ((mode & ~1) && end > (uint64_t)off)
    d_change(NULL, (size_t)(end - (uint64_t)off), (uint64_t)off);
  else if (!mode && end > d_size)
    d_change(NULL, 0, end);
  d_changed();
  return 0;
}

static int sim_open(const char *path, int flags, ...) {
  if (strcmp(path, "/sim/store")) return D_DIR;
  if (d_exists && (flags & O_CREAT) && (flags & O_EXCL))
    return errno = EEXIST, -1;
  if (!d_exists && !(flags & O_CREAT)) return errno = ENOENT, -1;
  if (!d_exists) {
    d_exists = 1;
    d_entered = d_nops = 0;
    d_size = d_durable_size = 0;
    memset(d_now, 0, D_SIZE);
    memset(d_durable, 0, D_SIZE);
  }
  return D_FD + d_fds++;
}

static int sim_close(int fd) {
  if (fd == D_DIR) return 0;
  if (--d_fds < 0) m_fail("closed twice");
  if (d_locked == fd) d_locked = 0;
  return 0;
}

static int sim_unlink(const char *path) {
  if (!strcmp(path, "/sim/store")) d_exists = 0;
  return 0;
}

static int sim_flock(int fd, int how) {
  if (d_locked) return errno = EWOULDBLOCK, -1;
  if (!(how & LOCK_UN)) d_locked = fd;
  return 0;
}

static int sim_fstat(int fd, struct stat *st) {
  memset(st, 0, sizeof *st);
  st->st_mode = fd == D_DIR ? S_IFDIR : d_device ? S_IFBLK : S_IFREG;
  st->st_mode |= 0644;
  st->st_size = d_device ? 0 : (off_t)d_size;
  st->st_blocks = (blkcnt_t)(d_size / 512);
  return 0;
}

static off_t sim_lseek(int fd, off_t off, int whence) {
  (void)fd;
  return whence == SEEK_END ? (off_t)d_size + off : off;
}

/* The clock of each process is another one, and may be late. */
static uint64_t d_clock; /* microseconds */
static int sim_clock(clockid_t clock, struct timespec *t) {
  (void)clock;
  d_clock++;
  t->tv_sec = (time_t)(d_clock / 1000000);
  t->tv_nsec = (long)(d_clock % 1000000 * 1000);
  return 0;
}
static void d_set_clock(uint64_t luck) {
  d_clock = UINT64_C(1000000000000000) + luck % 1000000 * 1000;
}

/* A thread of the store runs when the next one waits for it, or at m_step */
static int sim_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *),
                      void *arg) {
  (void)t, (void)a;
  if (d_thread || rnd(2)) return EAGAIN;
  d_thread = f;
  d_thread_arg = arg;
  return 0;
}

static void d_run(void) {
  void *(*f)(void *) = d_thread;
  d_thread = NULL;
  if (f) f(d_thread_arg);
}

static int sim_wait(pthread_cond_t *c, pthread_mutex_t *m) {
  (void)c;
  if (!d_thread) m_fail("it waits for nobody");
  pthread_mutex_unlock(m);
  d_run();
  pthread_mutex_lock(m);
  return 0;
}

static void *sim_malloc(size_t n) {
  union d_head *h;
  if (d_enter(MALLOC, D_FD, NULL)) return NULL;
  if (!(h = malloc(sizeof *h + n))) exit(2);
  memset(h + 1, 0xa5, n < 1 << 20 ? n : 1 << 20);
  h->next[0] = &d_heap;
  h->next[1] = d_heap.next[1];
  h->next[0]->next[1] = h->next[1]->next[0] = h;
  return h + 1;
}

static void sim_free(void *p) {
  union d_head *h = p;
  if (!p) return;
  h--;
  h->next[0]->next[1] = h->next[1];
  h->next[1]->next[0] = h->next[0];
  free(h);
}

/* The peer: it answers at once, until it hangs up or has said a byte that is
 * not the right one. */
static struct far_talk d_talk;
static size_t d_heard;  /* bytes of what it says that were taken */
static long d_left;     /* bytes until it hangs up; -1: never */
static long d_wrong;    /* bytes until one is wrong; -1: none */
static uint64_t d_days; /* that have gone by since the first store was made */
static uint64_t d_room; /* bytes that the file system has */

static ssize_t sim_send(int fd, const void *p, size_t n, int flags) {
  (void)flags;
  if (fd != D_PEER) return errno = EBADF, -1;
  if (rnd(4) == 0) n = 1 + rnd((uint32_t)n);
  far_hear(&d_talk, p, n);
  return (ssize_t)n;
}

static ssize_t sim_recv(int fd, void *p, size_t n, int flags) {
  size_t left = d_talk.nout - d_heard;
  (void)flags;
  if (fd != D_PEER) return errno = EBADF, -1;
  if (n > left) n = left;
  if (d_left >= 0 && n > (size_t)d_left) n = (size_t)d_left;
  if (n && rnd(4) == 0) n = 1 + rnd((uint32_t)n);
  memcpy(p, d_talk.out + d_heard, n);
  d_heard += n;
  if (d_left >= 0) d_left -= (long)n;
  if (d_wrong >= 0 && d_wrong < (long)n)
    ((unsigned char *)p)[d_wrong] ^= (unsigned char)(1 << rnd(8));
  if (d_wrong >= 0) d_wrong = d_wrong < (long)n ? -1 : d_wrong - (long)n;
  return (ssize_t)n;
}

static int sim_poll(struct pollfd *p, nfds_t n, int ms) {
  (void)ms;
  for (nfds_t i = 0; i < n; i++)
    p[i].revents = p[i].events;
  return (int)n;
}

static int sim_fstatvfs(int fd, struct statvfs *fs) {
  (void)fd;
  memset(fs, 0, sizeof *fs);
  fs->f_frsize = 4096;
  fs->f_blocks = 1 << 20;
  fs->f_bavail = (fsblkcnt_t)(d_room / 4096);
  return 0;
}

static time_t sim_time(time_t *t) {
  (void)t;
  return (time_t)(UINT64_C(1000000000) + d_days * 86400);
}

/* A path is that of the store, for which fstat says the same. */
static int sim_lstat(const char *path, struct stat *st) {
  if (strcmp(path, "/sim/store") || !d_exists) {
    errno = ENOENT;
    return -1;
  }
  return sim_fstat(D_FD, st);
}
#undef open
#undef lseek
#undef fstat
#undef lstat
#undef read
#undef pread
#undef pwrite
#undef preadv
#undef pwritev
#undef ftruncate
#undef fallocate
#undef fstatvfs
#define fstatvfs sim_fstatvfs
#define poll(p, n, ms) sim_poll(p, n, ms)
#define send(fd, p, n, flags) sim_send(fd, p, n, flags)
#define recv(fd, p, n, flags) sim_recv(fd, p, n, flags)
#define time(t) sim_time(t)
#define clock_gettime sim_clock
#define nanosleep(time, rest) ((void)(time))
#define open sim_open
#define close sim_close
#define unlink sim_unlink
#define flock sim_flock
#define fstat sim_fstat
#define lstat sim_lstat
#define lseek sim_lseek
#define read sim_read
#define pread sim_pread
#define pwrite sim_pwrite
#define preadv sim_preadv
#define pwritev sim_pwritev
#define fdatasync sim_fdatasync
#define fsync sim_fsync
#define ftruncate sim_ftruncate
#define fallocate sim_fallocate
#define pthread_create sim_create
#define pthread_cond_wait sim_wait
#define pthread_cond_timedwait(c, m, t) \
  ((void)(c), (void)(m), (void)(t), ETIMEDOUT)
#define NBDSERVE_MALLOC sim_malloc
#define NBDSERVE_FREE sim_free
#define NBDSERVE_NO_MAIN 1
#include "nbdserve.c"

enum {
  CK_LENIENT = 1, /* see cas_check */
  CK_FORGED = 2
};
static void cas_check(struct nbdserve_cas *st, int how);
static const unsigned char *ck_page(struct nbdserve_cas *st, uint32_t slot);

/* ---- The model: cells of 64 bytes that hold a number in a pattern -------- */

enum {
  CELL = 64,
  BLOCK = 512,
  PER = BLOCK / CELL,
  CELLS = 512 * PER,
  NVOLS = 8,
  NLATER = 20000,
  NHURT = 64,
  LOST = 0xffffff
};
enum {
  CREATE = 1,
  SNAPSHOT,
  CLONE,
  RENAME,
  ROLLBACK,
  RESIZE,
  RM,
  IMPORT, /* its contents are those of vols[NVOLS] */
  PULL,   /* of a snapshot, those of n_far, and so of its volume if it lacks */
  MANY    /* some of the above in one */
};
enum {       /* bits of m_vol.bad */
  BAD = 1,   /* the block cannot be read: what the model has of it may be so */
  VAGUE = 2, /* or not: it could not be read when that was to be found out */
  WAS = 4    /* it was written since, which is not durable as yet */
};

struct m_vol {
  char name[16];                         /* "": there is none */
  int readonly, is_open, sealed;         /* sealed: 2 is maybe */
  char id[72];                           /* that it has, or is to get */
  uint32_t size, old[CELLS], cur[CELLS]; /* old: after the last flush */
  unsigned char bad[CELLS / PER];        /* of each block */
  /* When it was written: 8: since the last flush that made something durable,
   * 4: since the one before that, and so on */
  unsigned char hot[CELLS / PER];
  struct nbdserve_export e;
};
static struct m_vol vols[NVOLS + 1]; /* the last one is being imported */
static struct {
  int vol;
  uint32_t cell, value;
} later[NLATER];
static int nlater;   /* what was written since the flush, if not cur */
static int m_flight; /* from here on: by a call that has not returned */
static int m_wrote;  /* something changed since the last flush */
static int m_acked;  /* no power was cut: what was acknowledged is there */
struct change {
  int kind;
  char from[16], name[16];
  uint32_t size;
};
static struct change change, many[3];
static int nmany;

/* Snapshots that the peer has, and what was pulled of them: struct far has what
 * it serves, cells what the model would have of it. */
enum {
  NFARS = 4
};
static struct n_far {
  struct far far;
  uint32_t size, cells[CELLS];
  char letter;           /* of the volume that it was made from, or 0 */
  int is_partial;        /* there is a volume with a part of it */
  uint64_t day;          /* when somebody went on with it last */
} n_fars[NFARS], *n_far; /* n_far: that is being pulled */
static long n_count[8];  /* pulls, of them complete, ... */

/* What disks have done to blocks of that contents (LOST: to something else),
 * and to the log since the store was opened */
static struct {
  uint32_t cells[NHURT][PER];
  int n, any, log, digests;
  int slot;  /* data or digest of a slot, since the store was opened */
  int super; /* 1 + which one was hurt, and may not have been healed */
  int fresh; /* something was hurt that may not have been healed */
} m_hurt;
static struct nbdserve_cas *cas;
static uint64_t m_seed;
static uint32_t m_max;  /* size of volumes */
static uint32_t m_last; /* contents that no cell had before */
static long cuts, recoveries, writes, snapshots;
static int m_trace, m_weight[2], m_over; /* m_over: reads fail */
static int m_must;        /* the call may not say that there is no space */
static int m_strict;      /* a write that fails once does not stop it */
static long m_refused[3]; /* d_refused, at the begin of the last steps */
static char m_doing[100];
static uint64_t k_tries; /* number of its last checkpoint, maybe a failed one */
static const char *const kinds[NKINDS] = {"plain", "full",     "enospc",
                                          "taken", "lostpage", "sector",
                                          "super", "kill",     "peer"};

/* Format 1 has not all that is asked of the next one. */
#ifdef NBDSERVE_CAS_REPAIR
#define M_NEW 1
#else
#define M_NEW 0
#endif

static void m_fail(const char *format, ...) {
  va_list args;
  printf("%s, seed %lu, cut %ld, step %ld (%s): ", kinds[d_kind],
         (unsigned long)m_seed, cuts, m_nth, m_doing);
  if (d_fault.nth)
    printf("call %ld of kind %d, error %d: ", d_fault.nth, d_fault.kind,
           d_fault.err);
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  fflush(stdout);
  _exit(1);
}

static void m_signal(int sig) {
  m_fail("signal %d", sig);
}

static void m_signals(void) {
  static const int sigs[] = {SIGABRT, SIGSEGV, SIGBUS, SIGALRM, SIGFPE};
  int i;
  for (i = 0; i < 5; i++)
    signal(sigs[i], m_signal);
}

static void m_do(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(m_doing, sizeof m_doing, format, args);
  va_end(args);
  m_nth++;
  memmove(m_refused + 1, m_refused, 2 * sizeof *m_refused);
  m_refused[0] = d_refused;
  if (m_trace) printf("%ld: %s\n", m_nth, m_doing);
  if (m_trace) fflush(stdout);
}

/* What cannot be forgotten any more */
static void m_settle(struct m_vol *v, uint32_t from, uint32_t to) {
  uint32_t b;
  int i, n = 0, flight = 0;
  for (b = (from + PER - 1) / PER; b < to / PER; b++)
    v->bad[b] &= (unsigned char)~WAS;
  memcpy(v->old + from, v->cur + from, (to - from) * sizeof *v->old);
  for (i = 0; i < nlater; i++) {
    if (i == m_flight) flight = n;
    if (later[i].vol != v - vols || later[i].cell < from || later[i].cell >= to)
      later[n++] = later[i];
  }
  m_flight = m_flight < nlater ? flight : n;
  nlater = n;
}

static struct m_vol *m_find(const char *name) {
  int i;
  for (i = 0; i < NVOLS; i++)
    if (!strcmp(vols[i].name, name)) return vols + i;
  return NULL;
}

/* The volume of a snapshot's name */
static struct m_vol *m_base(const char *name) {
  char base[16];
  snprintf(base, sizeof base, "%.*s", (int)strcspn(name, "@"), name);
  return m_find(base);
}

static void m_close(struct m_vol *v) {
  if (v->is_open) v->e.ops->close(v->e.ctx);
  v->is_open = 0;
}

static void m_fill(unsigned char *p, uint32_t value) {
  uint32_t i;
  for (i = 0; i < CELL; i++)
    p[i] = !value ? 0
                  : (unsigned char)(i < 3 ? value >> 8 * i
                                          : value * 2654435761u >> (i % 25));
}

/* May it have no room?  Not if all blocks that are or were there, their map
 * pages twice, and what is kept back, are far from filling the disk. */
static int m_full(void) {
  uint64_t blocks = 400 + (uint64_t)nlater;
  uint32_t i, c;
  for (i = 0; i < NFARS; i++)
    blocks += n_fars[i].size / PER * 2;
  for (i = 0; i < NVOLS; i++)
    for (c = 0; vols[i].name[0] && c < vols[i].size; c += PER)
      blocks += 1 + !(c / PER % 3);
  return d_full && d_meta + blocks * (BLOCK + 32) > d_limit * 3 / 4;
}

/* Is an error in order?  A write that has failed is that of who asked for it,
 * or of a thread of the store, and of nobody later. */
static int m_excused(int err) {
  int writes = d_fault.kind == PWRITE || d_fault.kind == PWRITEV ||
               d_fault.kind == FALLOCATE;
  if (d_fault.fired && d_fault.err && d_fault.err != EINTR)
    return !m_strict || !writes || d_stopped ||
           (err == -d_fault.err && m_nth <= d_fault.step + 1);
  if (err != -ENOSPC) return 0;
  if (d_kind == SCARCE)
    return d_refused > m_refused[2] ||
           (d_asked >= d_scarce.from && d_asked < d_scarce.to);
  if (d_kind == FULL || d_kind == TAKEN) return !m_must;
  return m_full() && !(m_must && M_NEW);
}

/* Is there no space for it?  Not that it must have. */
static int m_excused_but(int err) {
  int excused;
  m_must = 1;
  excused = m_excused(err);
  m_must = 0;
  return excused;
}

/* The number that a cell holds; LOST: it holds something else */
static uint32_t m_number(const unsigned char *p) {
  uint32_t value = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16;
  unsigned char cell[CELL];
  m_fill(cell, value);
  return memcmp(cell, p, CELL) ? LOST : value;
}

/* May a cell hold that after a cut? */
static int m_legal(const struct m_vol *v, uint32_t c, uint32_t value) {
  int i = m_acked ? m_flight : 0;
  if (value == v->cur[c] || (!m_acked && value == v->old[c])) return 1;
  if (v->bad[c / PER] & (VAGUE | WAS)) return 1;
  for (; i < nlater; i++)
    if (later[i].vol == v - vols && later[i].cell == c &&
        later[i].value == value)
      return 1;
  return 0;
}

/* May a block be gone, because something was done to one with its contents? */
static int m_may_fail(const struct m_vol *v, uint32_t block) {
  struct m_vol *s = change.kind == ROLLBACK ? m_find(change.name) : NULL;
  uint32_t c;
  int k;
  if (v->bad[block] || m_hurt.log) return 1; /* its slot may be a page now */
  /* What was not flushed may be gone, but if its digest is there nobody knows
   * that when the slot cannot be read. */
  if (m_hurt.slot && v->hot[block] & 8) return 1;
  for (c = block * PER; c < (block + 1) * PER && c < v->size; c++)
    if (v->cur[c] == LOST) return 1; /* it was read so, unchecked */
  if (s && v == m_base(change.name) && m_may_fail(s, block)) return 1;
  for (k = 0; k < m_hurt.n && k < NHURT; k++) {
    for (c = block * PER; c < (block + 1) * PER && c < v->size; c++)
      if (!m_legal(v, c, m_hurt.cells[k][c % PER])) break;
    if (c == (block + 1) * PER || c >= v->size) return 1;
  }
  return 0;
}

/* A name of it.  By an id another one may be found, with the same contents. */
static const char *m_called(const struct m_vol *v) {
  return v->sealed == 1 && rnd(2) ? v->id : v->name;
}

static int m_open(struct m_vol *v) {
  int err;
  if (v->is_open) return 0;
  memset(&v->e, 0, sizeof v->e);
  err = nbdserve_cas_volume(cas, m_called(v), &v->e);
  if (err && m_excused(err)) return m_over = err;
  if (err) m_fail("%s: does not open: %d", v->name, err);
  v->is_open = 1;
  if (v->e.size != (uint64_t)v->size * CELL)
    m_fail("%s: %lu bytes, not %lu", v->name, (unsigned long)v->e.size,
           (unsigned long)v->size * CELL);
  return 0;
}

/* Reads n cells; LOST: not one of ours.  Blocks that cannot be read, and may
 * be so, are taken for what they should be. */
static int m_read(struct m_vol *v, uint32_t at, uint32_t n, uint32_t *values) {
  static unsigned char b[CELLS * CELL];
  uint32_t i, k, part;
  int err = m_open(v), whole;
  if (err) return err;
  err = v->e.ops->read(v->e.ctx, b, (uint64_t)at * CELL, (uint64_t)n * CELL, 0);
  if (err && m_excused(err)) return m_over = err;
  whole = !err;
  if (err && !(err == -EIO && m_hurt.any))
    m_fail("%s: read of %u cells at %u: %d", v->name, n, at, err);
  for (i = 0; i < n; i += part) {
    part = PER - (at + i) % PER;
    if (part > n - i) part = n - i;
    if (!whole)
      err = v->e.ops->read(v->e.ctx, b + i * CELL, (uint64_t)(at + i) * CELL,
                           (uint64_t)part * CELL, 0);
    if (err && !(err == -EIO && m_may_fail(v, (at + i) / PER)))
      m_fail("%s: read of block %u: %d", v->name, (at + i) / PER, err);
    if (err)
      v->bad[(at + i) / PER] |= BAD;
    else
      v->bad[(at + i) / PER] &= (unsigned char)~BAD;
    for (k = i; k < i + part; k++)
      values[k] = err ? v->cur[at + k] : m_number(b + k * CELL);
  }
  return 0;
}

/* Writes, sometimes as several requests of a batch */
static int m_write(struct m_vol *v, unsigned char *b, uint64_t off,
                   uint64_t len, uint32_t flags) {
  struct nbdserve_req r[4];
  int n = 0, err = 0;
  if (flags || !v->e.ops->run_batch || rnd(2))
    return v->e.ops->write(v->e.ctx, b, off, len, flags);
  memset(r, 0, sizeof r);
  for (; len; off += r[n].len, b += r[n].len, len -= r[n++].len) {
    r[n].type = NBD_CMD_WRITE;
    r[n].buf = b;
    r[n].off = off;
    r[n].len = n < 3 ? (1 + rnd((uint32_t)len / CELL)) * CELL : len;
  }
  v->e.ops->run_batch(v->e.ctx, r, (size_t)n);
  while (n-- > 0)
    err = r[n].err ? r[n].err : err;
  return err;
}

/* n cells at a cell get values, by the call of that kind */
enum {
  M_WRITE,
  M_ZERO,
  M_TRIM
};
static void m_put(struct m_vol *v, uint32_t at, uint32_t n,
                  const uint32_t *values, int kind) {
  static unsigned char b[CELLS * CELL];
  static uint32_t found[CELLS];
  const struct nbdserve_ops *ops;
  uint64_t off = (uint64_t)at * CELL, len = (uint64_t)n * CELL;
  uint32_t i, fua;
  int err, bad = 0;
  if (nlater + (int)n > NLATER || m_open(v)) return;
  ops = v->e.ops;
  m_flight = nlater;
  for (i = at / PER; i <= (at + n - 1) / PER; i++) {
    v->hot[i] |= 8;
    bad |= m_hurt.any && m_may_fail(v, i);
  }
  fua = (v->e.flags & NBDSERVE_EXPORT_NATIVE_FUA) && rnd(8) == 0;
  for (i = 0; i < n; i++) {
    m_fill(b + i * CELL, values[i]);
    later[nlater].vol = (int)(v - vols);
    later[nlater].cell = at + i;
    later[nlater++].value = values[i];
  }
  writes++;
  if (kind == M_WRITE)
    err = m_write(v, b, off, len, fua);
  else if (kind == M_TRIM)
    err = ops->trim(v->e.ctx, off, len, fua);
  else
    err = ops->zero(v->e.ctx, off, len,
                    fua | (rnd(2) ? NBDSERVE_CMD_NO_HOLE : 0));
  if (err && !(err == -EIO && bad) &&
      !(kind == M_TRIM ? m_excused_but(err) : m_excused(err)))
    m_fail("%s: %d", v->name, err);
  memcpy(found, values, n * sizeof *found);
  if ((err || kind == M_TRIM) && m_read(v, at, n, found)) return; /* some */
  for (i = 0; i < n; i++) {
    if (found[i] != values[i] && found[i] != v->cur[at + i] &&
        !(v->bad[(at + i) / PER] & VAGUE))
      m_fail("%s: block %u cell %u was %x, should be %x, is %x", v->name,
             (at + i) / PER, (at + i) % PER, v->cur[at + i], values[i],
             found[i]);
    m_wrote |= v->cur[at + i] != found[i];
    v->cur[at + i] = found[i];
    if (!err && kind != M_TRIM && v->bad[(at + i) / PER])
      v->bad[(at + i) / PER] = WAS;
  }
  m_flight = nlater;
  if (!err && fua) m_settle(v, at, at + n);
}

/* Does something else meanwhile: for what calls back, or lasts. */
static void m_meanwhile(void) {
  static uint32_t values[4 * PER];
  struct m_vol *v = vols + rnd(NVOLS);
  uint32_t n = 1 + rnd(4 * PER), at;
  if (!v->name[0] || v->readonly || v->size < n) return;
  at = rnd(v->size - n + 1);
  for (uint32_t i = 0; i < n; i++)
    values[i] = 100 + ++m_last;
  m_put(v, at, n, values, M_WRITE);
}

static int m_flush(struct m_vol *v) {
  int err = m_open(v), i, k;
  if (!err) err = v->e.ops->flush(v->e.ctx, 0);
  if (!err)
    m_settle(v, 0, CELLS);
  else if (!m_excused_but(err))
    m_fail("%s: %d", v->name, err);
  for (i = 0; !err && m_wrote && i < NVOLS; i++)
    for (k = 0; vols[i].name[0] && k < CELLS / PER; k++)
      vols[i].hot[k] /= 2;
  if (!err) m_wrote = 0;
  return err;
}

/* Makes several changes in one in the model, or none if one of them cannot be;
 * dry: does not make them.  How many can be. */
static int m_possible(void);
static void m_apply(void);
static int m_many(int dry) {
  static struct m_vol saved[NVOLS];
  struct change all = change;
  int i, n = nlater;
  static char kept[sizeof later];
  memcpy(saved, vols, sizeof saved);
  memcpy(kept, later, sizeof later);
  for (i = 0; i < nmany; i++) {
    change = many[i];
    if ((change.kind <= CLONE && !m_find("")) || !m_possible()) break;
    m_apply();
  }
  if (dry || i < nmany) {
    memcpy(vols, saved, sizeof saved);
    memcpy(later, kept, sizeof later);
    nlater = n;
  }
  change = all;
  return i;
}

/* Could the change be made?  And makes it in the model. */
static int m_possible(void) {
  struct m_vol *v = m_find(change.name), *f = m_find(change.from), *s;
  char *at = strchr(change.name, '@');
  switch (change.kind) {
  case CREATE:
    return !v;
  case SNAPSHOT:
    return !v && m_base(change.name);
  case CLONE:
    return !v && f;
  case ROLLBACK:
    return v && at;
  case RENAME:
    return !v && f;
  case RESIZE:
    return v && !at;
  case IMPORT:
  case PULL:
    return !v && m_find("");
  case MANY:
    return m_many(1) == nmany;
  }
  for (s = vols; v && !at && s < vols + NVOLS; s++)
    if (strchr(s->name, '@') && m_base(s->name) == v) return 0;
  return v != NULL;
}

/* What is pulled is there. */
static void n_apply(void) {
  struct m_vol *up = m_base(change.name), *v = NULL;
  int i;
  for (i = up != NULL; i < 2; i++) {
    v = m_find("");
    memset(v, 0, sizeof *v);
    v->size = n_far->size;
    memcpy(v->cur, n_far->cells, sizeof v->cur);
    memcpy(v->name, change.name, sizeof v->name);
    if (i == 0) v->name[strcspn(v->name, "@")] = 0;
    m_settle(v, 0, CELLS);
  }
  v->readonly = v->sealed = 1;
  strcpy(v->id, n_far->far.id);
}

static void m_apply(void) {
  struct m_vol *v = m_find(change.name), *f = m_find(change.from), *s;
  char name[16];
  if (change.kind == SNAPSHOT) f = m_base(change.name);
  if (change.kind == ROLLBACK) f = v, v = m_base(change.name);
  if (change.kind == IMPORT) f = vols + NVOLS;
  switch (change.kind) {
  case CREATE:
  case SNAPSHOT:
  case CLONE:
  case IMPORT:
    v = m_find("");
    memset(v, 0, sizeof *v);
    memcpy(v->name, change.name, sizeof v->name);
    v->readonly = change.kind == SNAPSHOT;
    v->size = change.size; /* fall through */
  case ROLLBACK:
    if (change.kind != CREATE) {
      v->size = f->size;
      memcpy(v->cur, f->cur, sizeof v->cur);
      memcpy(v->bad, f->bad, sizeof v->bad);
    }
    m_settle(v, 0, CELLS);
    break;
  case MANY:
    m_many(0);
    break;
  case PULL:
    n_apply();
    break;
  case RENAME:
    for (s = vols; s < vols + NVOLS; s++)
      if (s->name[0] && m_base(s->name) == f && s != f) {
        snprintf(name, sizeof name, "%.6s%.6s", change.name,
                 strchr(s->name, '@'));
        memcpy(s->name, name, sizeof name);
      }
    memcpy(f->name, change.name, sizeof f->name);
    break;
  case RESIZE:
    if (change.size > v->size) /* it grows with zeroes */
      memset(v->cur + v->size, 0, (change.size - v->size) * sizeof *v->cur);
    v->size = change.size;
    memset(v->cur + v->size, 0, (CELLS - v->size) * sizeof *v->cur);
    memset(v->bad + (v->size + PER - 1) / PER, 0,
           sizeof v->bad - (v->size + PER - 1) / PER);
    m_settle(v, v->size, CELLS);
    break;
  case RM:
    v->name[0] = 0;
  }
  change.kind = 0;
}

/* What no change may be made of: too many, or to itself */
static int m_odd(const struct change *c) {
  return (c->kind <= CLONE && !m_find("")) || !strcmp(c->name, c->from);
}

/* A change that clears what is behind the end of a volume fails if it cannot
 * read the block there. */
static int m_tail(int err) {
  struct m_vol *v = m_base(change.name);
  return err == -EIO && m_hurt.any && v && v->size % PER &&
         (change.kind == SNAPSHOT || change.kind == RESIZE) &&
         m_may_fail(v, v->size / PER);
}

static int m_change(void) {
  uint64_t size = (uint64_t)change.size * CELL;
  int possible = m_possible(), i, err = 0;
  char *name = change.name, *from = change.from;
  if (m_odd(&change)) return change.kind = 0;
  for (i = 0; change.kind >= RENAME && i < NVOLS; i++)
    m_close(vols + i);
  m_do("change %d: %s %s %u", change.kind, name, from, change.size);
  err = nbdserve_cas_change(
      cas, change.kind,
      change.kind == CLONE || change.kind == RENAME ? from : name, name, size);
  snapshots += change.kind == SNAPSHOT && !err;
  if (!err && !possible) m_fail("that cannot succeed");
  m_must =
      change.kind == RM || change.kind == RENAME || change.kind == ROLLBACK;
  if (err && possible && !m_excused(err) && !m_tail(err)) m_fail("%d", err);
  m_must = 0;
  if (!err)
    m_apply();
  else if (!possible || !d_fault.fired || err == -ENOMEM ||
           (m_strict && !d_stopped))
    change.kind = 0; /* else: who knows */
  return err;
}

static int m_listed(void *arg, const struct nbdserve_cas_info *info) {
  struct m_vol *v = m_find(info->name);
  int i;
  for (i = 0; i < NFARS; i++)
    if (!strcmp(info->name, n_fars[i].far.part)) {
      if (info->readonly || *info->id || !info->partial)
        return 1; /* its size may be a lie, so far */
      n_fars[i].is_partial = 1;
      return 0;
    }
  if (!v || info->size != (uint64_t)v->size * CELL ||
      v->readonly != info->readonly)
    return 1;
  if (*info->id ? !v->sealed || strcmp(info->id, v->id) : v->sealed == 1)
    m_fail("%s: its id is '%s', should be '%s' (%d)", v->name, info->id, v->id,
           v->sealed);
  v->sealed = *info->id != 0;
  ++*(int *)arg;
  return 0;
}

/* Does the store have the model's volumes and snapshots? */
static int m_catalog(void) {
  int n = 0, i, differ;
  for (i = 0; i < NFARS; i++)
    n_fars[i].is_partial = 0;
  differ = nbdserve_cas_list(cas, m_listed, &n);
  for (i = 0; i < NVOLS; i++)
    n -= vols[i].name[0] != 0;
  return !differ && !n;
}

/* What verify or repair has named, of each volume */
static unsigned char m_named[NVOLS][CELLS / PER];

/* Is it a part of what is being pulled, of which blocks have rotted? */
static int n_damaged(const char *name, uint64_t off, uint64_t len) {
  uint64_t b;
  int i = 0, k;
  while (i < NFARS && (!name || strcmp(name, n_fars[i].far.id)))
    i++;
  if (i == NFARS) return 0;
  for (b = off / BLOCK; b * BLOCK < off + len; b++) {
    for (k = 0; k < m_hurt.n && k < NHURT; k++)
      if (!memcmp(n_fars[i].cells + b * PER, m_hurt.cells[k],
                  sizeof m_hurt.cells[k]))
        break;
    if (k == m_hurt.n || k == NHURT)
      m_fail("verify: block %lu of a part", (unsigned long)b);
  }
  return 1;
}

static void m_name_damage(const char *name, uint64_t off, uint64_t len,
                          const char *why) {
  if (m_hurt.any && name && strstr(name, "/partial")) return; /* the base's */
  if (n_damaged(name, off, len)) return;
  struct m_vol *v = name && *name ? m_find(name) : NULL;
  uint64_t b;
  if (d_frozen && !len) return; /* a torn superblock, which open repairs */
  if (m_excused(-EIO)) return;
  if (m_hurt.any && !len) return; /* a part of the store */
  if (!v || !m_hurt.any || off % BLOCK || off + len > (uint64_t)v->size * CELL)
    m_fail("verify: %s %lu %lu: %s", name ? name : "-", (unsigned long)off,
           (unsigned long)len, why);
  for (b = off / BLOCK; b * BLOCK < off + len; b++) {
    if (!m_may_fail(v, (uint32_t)b) && !m_hurt.digests)
      m_fail("verify: %s block %lu: %s", name, (unsigned long)b, why);
    m_named[v - vols][b] = 1;
  }
}

#if M_NEW
static int m_damage(void *arg, const char *name, uint64_t off, uint64_t len,
                    const char *why) {
  (void)arg;
  m_name_damage(name, off, len, why);
  return 0;
}
#else
static void m_damage(void *arg, const char *name, uint64_t off, uint64_t len,
                     const char *why) {
  (void)arg;
  m_name_damage(name, off, len, why);
}
#endif

/* All that cannot be read was named? */
static int m_verified(int err) {
  int i, k, bad = 0;
  if (d_frozen && err == -EUCLEAN) return 0;
  if (err && !(err == -EUCLEAN && m_hurt.any) && !m_excused(err))
    m_fail("verify: %d", err);
  for (i = 0; (!err || err == -EUCLEAN) && i < NVOLS; i++)
    for (k = 0; vols[i].name[0] && k < CELLS / PER; k++) {
      if (!strcmp(m_doing, "repair") && !m_named[i][k])
        vols[i].bad[k] &= (unsigned char)~BAD; /* mended by an equal block */
      bad |= vols[i].bad[k] & BAD;
      if (vols[i].bad[k] & BAD && !m_named[i][k])
        m_fail("verify does not name block %d of %s", k, vols[i].name);
    }
  if (bad && !err) m_fail("verify says that all is well");
  return err == -EUCLEAN ? 0 : err;
}

static int m_verify(void) {
  memset(m_named, 0, sizeof m_named);
  return m_verified(nbdserve_cas_verify(cas, m_damage, NULL, NULL));
}

/* What block c of a volume has, for its id; returns whether not only zeroes. */
static int m_block(const struct m_vol *v, uint32_t c, unsigned char b[BLOCK]) {
  uint32_t i;
  memset(b, 0, BLOCK);
  for (i = c * PER; i < (c + 1) * PER && i < v->size; i++)
    m_fill(b + i % PER * CELL, v->cur[i]);
  return *b || memcmp(b, b + 1, BLOCK - 1);
}

/* What the id of a snapshot is, by the definition in nbdserve.h */
static void m_identify(struct m_vol *v) {
  unsigned char b[BLOCK];
  uint32_t blocks = (v->size + PER - 1) / PER, c, i;
#if M_NEW
  enum {
    FAN = CAS_FANOUT(BLOCK)
  };
  static unsigned char run[58 + (CELLS / PER + FAN) * 32];
  unsigned char *d = run + 26, zeroes[FAN * 32] = {0};
  uint32_t n = blocks, level;
  memset(run, 0, sizeof run);
  for (c = 0; c < blocks; c++)
    if (m_block(v, c, b)) sha_256(d_hw, b, NULL, BLOCK, d + c * 32, NULL);
  for (level = 0; level < 4; level++, n = (n + FAN - 1) / FAN)
    for (c = 0; c * FAN < n; c++) {
      unsigned char *from = d + c * FAN * 32, sum[32] = {0};
      if (memcmp(from, zeroes, sizeof zeroes))
        sha_256(d_hw, from, NULL, sizeof zeroes, sum, NULL);
      memset(from, 0, sizeof zeroes);
      memcpy(d + c * 32, sum, 32);
    }
  memcpy(run, "nbdserve-cid-2", 14);
  u_put32(run + 14, BLOCK);
  u_put64(run + 18, (uint64_t)v->size * CELL);
  sha_256(0, run, NULL, 58, run, NULL);
#else
  static unsigned char run[32 + 256 * 32];
  memcpy(run, "nbdserve-cid-1", 14);
  u_put32(run + 14, BLOCK);
  u_put64(run + 18, (uint64_t)v->size * CELL);
  sha_256(0, run, NULL, 26, run, NULL);
  for (c = 0; c < blocks; c += 256) {
    memset(run + 32, 0, 256 * 32);
    for (i = c; i < c + 256 && i < blocks; i++)
      if (m_block(v, i, b))
        sha_256(0, b, NULL, BLOCK, run + 32 + i % 256 * 32, NULL);
    sha_256(0, run, NULL, sizeof run, run, NULL);
  }
#endif
  strcpy(v->id, "sha256-");
  for (i = 0; i < 32; i++)
    snprintf(v->id + 7 + 2 * i, 3, "%02x", run[i]);
}

static int m_seal(struct m_vol *v) {
  char id[72];
  int err, i, bad = 0;
  if (m_hurt.digests) return 0; /* what is read may be unchecked */
  m_do("seal %s", v->name);
  for (i = 0; i < CELLS / PER; i++)
    bad |= v->bad[i];
  if (!v->sealed) m_identify(v);
  if (!v->sealed) v->sealed = v->readonly ? 2 : 0;
  err = nbdserve_cas_seal(cas, m_called(v), id, NULL, NULL);
  if (bad && err == -EIO) return 0;
  if (err == (v->readonly ? 0 : -EINVAL)) {
    if (!err && !bad && strcmp(id, v->id))
      m_fail("%s, should be %s", id, v->id);
    if (!err && bad) strcpy(v->id, id); /* of what nobody checked */
    v->sealed = v->readonly;
    return 0;
  }
  if (!m_excused(err)) m_fail("seal: %d", err);
  return err;
}

/* Takes note of the blocks of a range, and of whether it may be one */
static struct {
  uint64_t end;
  int stop;
  unsigned char is[CELLS / PER];
} range;

static int m_range(void *arg, uint64_t off, uint64_t len) {
  if (arg != &range || !len || off % BLOCK || (off <= range.end && off) ||
      (off == 0 && range.end))
    m_fail("range %lu %lu behind %lu", (unsigned long)off, (unsigned long)len,
           (unsigned long)range.end);
  range.end = off + len;
  for (; off < range.end; off += BLOCK)
    range.is[off / BLOCK] = 1;
  return range.stop && !--range.stop ? 1234 : 0;
}

static int m_diff(struct m_vol *v, struct m_vol *w) {
  uint32_t size = v->size > w->size ? v->size : w->size, c, i;
  int err, differs;
  if (!w->name[0]) return 0;
  m_do("diff %s %s", v->name, w->name);
  memset(&range, 0, sizeof range);
  range.stop = rnd(4) ? 0 : 1 + (int)rnd(3);
  err = nbdserve_cas_diff(cas, m_called(v), m_called(w), m_range, &range);
  if (err == 1234) return 0;
  if (err && !m_excused(err)) m_fail("diff: %d", err);
  if (err) return err;
  for (c = 0; c < size; c += PER) {
    for (i = c, differs = 0; i < c + PER && i < size; i++)
      differs |= (i < v->size ? v->cur[i] : 0) != (i < w->size ? w->cur[i] : 0);
    if (v->bad[c / PER] | w->bad[c / PER]) continue;
    if (differs && !range.is[c / PER]) /* too much is allowed: see the header */
      m_fail("%s and %s differ in block %u: %d", v->name, w->name, c / PER,
             differs);
  }
  if (range.end > (uint64_t)size * CELL) m_fail("a difference behind the end");
  return 0;
}

/* May a block that could be read be an older one?  One that is stored where
 * something was done to, if nothing said that it is durable; of a log page that
 * is damaged all entries, and when it is the last one that was flushed, or
 * among those that were flushed together last, these, too. */
static int m_spared(const struct m_vol *v, uint32_t block, long *spared) {
  static const struct m_vol *last;
  static uint32_t last_block;
  uint32_t c;
  int zero = 1;
  if (!m_hurt.log) return m_may_fail(v, block);
  for (c = block * PER; c < (block + 1) * PER && c < v->size; c++)
    zero &= !v->cur[c];
  if (v->hot[block] || zero) return 1; /* zeroes: many have one entry */
  if (*spared && last == v && last_block == block) return 1;
  last = v;
  last_block = block;
  return ++*spared <= (long)d_entries;
}

/* What was found is what the volume has from now on. */
static void m_found(struct m_vol *v, const uint32_t *found) {
  uint32_t b, c;
  int i;
  for (b = 0; b * PER < v->size; b++) {
    uint32_t from = b * PER, n = v->size - from < PER ? v->size - from : PER;
    if (v->bad[b] & BAD) { /* who knows */
      for (c = from; c < from + n; c++)
        if (v->old[c] != v->cur[c]) v->bad[b] |= VAGUE;
      for (i = 0; i < nlater; i++)
        if (later[i].vol == v - vols && later[i].cell / PER == b)
          v->bad[b] |= VAGUE;
    } else {
      v->bad[b] = 0;
    }
    memcpy(v->cur + from, found + from, n * sizeof *found);
  }
  m_settle(v, 0, CELLS);
}

/* The map of what an interrupted pull has left is whole.  Which of its blocks
 * are the base's still, the pull that goes on finds out. */
static void n_sound(void) {
  uint32_t at, c;
  int i;
  for (at = 0; at < cas->nvolumes; at++) {
    struct cas_volume *vol = cas->volumes[at];
    if (vol->now.flags != CAS_IS_PARTIAL) continue;
    for (i = 0; i < NFARS && strcmp(vol->now.name, n_fars[i].far.part);)
      i++;
    if (i == NFARS) m_fail("a part of what nobody has pulled");
    for (c = 0; c < n_fars[i].far.blocks; c++) {
      struct cas_spot spot;
      os_lock(&cas->lock);
      int err = cas_find_spot(cas, cas_root(vol), c, &spot);
      os_unlock(&cas->lock);
      if (err || spot.slot == CAS_LOST) m_fail("a part's map: %d", err);
    }
  }
}

/* Compares all with the model, which then is what was found. */
static void m_check(void) {
  static uint32_t found[CELLS];
  struct m_vol *v, *s;
  uint32_t c;
  long spared = 0;
  if (!m_catalog()) {
    if (!change.kind || !m_possible()) m_fail("the catalog is not what it was");
    m_apply();
    if (!m_catalog()) m_fail("the catalog is neither old nor new");
  }
  for (v = vols; v < vols + NVOLS; v++) {
    if (!v->name[0]) continue;
    if (v->size && m_read(v, 0, v->size, found)) continue;
    s = change.kind == ROLLBACK && v == m_base(change.name) && v->name[0]
            ? m_find(change.name)
            : NULL; /* in progress: then all or nothing */
    for (c = 0; s && c < v->size; c++)
      if (found[c] != s->cur[c] && !(v->bad[c / PER] & BAD)) s = NULL;
    for (c = 0; !s && c < v->size; c++) {
      if (m_legal(v, c, found[c]) || v->bad[c / PER] ||
          (m_hurt.any && m_spared(v, c / PER, &spared)))
        continue;
      m_fail("%s: block %u cell %u was %x at the last flush and %x in the "
             "end, is %x",
             v->name, c / PER, c % PER, v->old[c], v->cur[c], found[c]);
    }
    m_found(v, found);
    if (s) memcpy(v->cur, s->cur, sizeof v->cur);
    if (s) m_settle(v, 0, CELLS);
  }
  v = change.kind == RESIZE ? m_find(change.name) : vols + rnd(NVOLS);
  for (s = vols; v && v->name[0] && s < vols + NVOLS; s++)
    m_diff(v, s);
  change.kind = 0;
  n_sound();
  m_verify();
  m_hurt.log &= d_frozen;
  m_hurt.slot &= d_frozen;
  if (!d_frozen) m_hurt.super = m_hurt.fresh = 0;
  m_acked = 1;
  m_flight = nlater;
}

static void m_sound(void);

/* Closes the store, which may then hold no memory and no file */
static int m_shut(void) {
  int i, err;
  m_sound();
  for (i = 0; i < NVOLS; i++)
    m_close(vols + i);
  err = nbdserve_cas_close(cas);
  cas = NULL;
  d_run();
  if (err && !m_excused_but(err)) m_fail("close: %d", err);
  if (!d_frozen) d_lost();
  if (d_fds || d_heap.next[0] != &d_heap)
    m_fail("not closed or freed, descriptors: %d", d_fds);
  for (i = 0; !err && !m_over && i < NVOLS; i++)
    m_settle(vols + i, 0, CELLS);
  return err;
}

/* As when the process has ended */
static void m_forget(void) {
  int i;
  while (d_heap.next[0] && d_heap.next[0] != &d_heap)
    sim_free(d_heap.next[0] + 1);
  d_heap.next[0] = d_heap.next[1] = &d_heap;
  d_thread = NULL;
  d_fds = d_locked = d_frozen = d_full = 0;
  k_tries = 0;
  d_set_clock(d_clock * 7919 + m_seed);
  cas = NULL;
  for (i = 0; i <= NVOLS; i++)
    vols[i].is_open = 0;
}

/* A store whose log has a gap, behind which there is something that is durable,
 * opens read-only until repair has gone on behind it. */
static int m_mended(int err) {
#if M_NEW
  struct nbdserve_cas_options o = {0};
  if (!m_hurt.log || (!err && !cas->readonly)) return err;
  if (!err) nbdserve_cas_close(cas);
  m_do("repair the log");
  o.flags = NBDSERVE_CAS_VERIFY | NBDSERVE_CAS_REPAIR;
  err = nbdserve_cas_open("/sim/store", &o, &cas);
  if (err) m_fail("open for repair: %d", err);
  err = nbdserve_cas_repair(cas, NULL, m_damage, NULL, NULL);
  if (err && err != -EUCLEAN) m_fail("repair: %d", err);
  nbdserve_cas_close(cas);
  m_do("open what was repaired");
  o.flags = NBDSERVE_CAS_VERIFY;
  err = nbdserve_cas_open("/sim/store", &o, &cas);
  if (!err && cas->readonly) m_fail("it still cannot be written");
#endif
  return err;
}

/* When what was pulled in part was gone on with last, as the store has it:
 * until something comes, that is in memory only. */
static void n_days(void) {
  uint32_t at;
  int i;
  for (at = 0; at < cas->nvolumes; at++)
    for (i = 0; i < NFARS; i++)
      if (!strcmp(cas->volumes[at]->now.name, n_fars[i].far.part))
        n_fars[i].day = (cas->volumes[at]->now.created - 1000000000) / 86400;
}

static int m_reopen(void) {
  struct nbdserve_cas_options o = {0};
  int err;
  o.flags = rnd(2) || m_hurt.any ? NBDSERVE_CAS_VERIFY : NBDSERVE_CAS_NO_VERIFY;
  d_full = 0;
  k_tries = 0;
  m_do("open");
  err = m_mended(nbdserve_cas_open("/sim/store", &o, &cas));
  if (err && !m_excused_but(err)) m_fail("open: %d", err);
  if (err && (d_fds || d_heap.next[0] != &d_heap))
    m_fail("open: %d, not closed or freed, descriptors: %d", err, d_fds);
  if (err) m_forget();
  /* Not by chance, so that the histories below stay what they are: */
  if (!err && m_nth % 3 == 0) cas->cache = 3 * BLOCK; /* leaves are evicted */
  m_sound();
  recoveries += !err;
  if (!err) n_days();
  return err;
}

static void m_name(char *name, int snapshot) {
  int letter = 'a' + (int)rnd(4);
  snprintf(name, 16, snapshot ? "%c@%u" : "%c", letter, rnd(3));
}

/* What blocks are given: new contents, some that repeat, zeroes, or a copy */
static void m_values(uint32_t *values, uint32_t n) {
  struct m_vol *v = vols + rnd(NVOLS);
  uint32_t i, kind = 0, from = 0;
  for (i = 0; i < n; i++) {
    if (i % PER == 0) kind = rnd(10), from = rnd(CELLS / PER) * PER;
    values[i] = kind < 4    ? 100 + ++m_last
                : kind < 6  ? 1 + from % 12
                : kind == 6 ? 0
                : kind < 9  ? 20 + from % 64
                            : v->cur[from + i % PER];
  }
}

/* Closes the store and opens it again.  What is in use is the same, so no
 * reference was counted that is not there, nor the other way round. */
static int m_again(struct m_vol *v) {
  struct nbdserve_cas_stat was, is;
  int err = 0, whole = !v->readonly && v->size % PER == 0;
  m_close(v);
  d_scarce.to = 0; /* no opening with less than there must be */
  /* Which writes a checkpoint, and changes nothing; of a size that is odd it
   * clears the tail behind it, and a leaf is without a slot. */
  if (whole) err = nbdserve_cas_resize(cas, v->name, (uint64_t)v->size * CELL);
  if (!err) nbdserve_cas_stat(cas, &was);
  if (err && !m_excused(err)) m_fail("%d", err);
  if (!err) err = m_shut();
  if (!err) err = m_reopen();
  if (!err) nbdserve_cas_stat(cas, &is);
  if (!err && whole && !d_fault.fired && was.stored != is.stored)
    m_fail("%lu bytes are stored, %lu when opened again",
           (unsigned long)was.stored, (unsigned long)is.stored);
  return err;
}

static int m_progress(void *arg, uint64_t done, uint64_t total) {
  (void)arg, (void)done, (void)total;
  if (rnd(4) == 0) m_meanwhile();
  return 0;
}

static int m_gc(void) {
  static unsigned char had[D_SIZE / D_SLOT];
  uint64_t bytes;
  uint32_t x;
  long refused = d_refused;
  int err, was_full = d_full;
  m_do("gc");
  d_full = 0;
  for (x = 0; x < cas->nslots; x += CAS_SEGMENT)
    had[x] = cas_segment(cas, x)->npages > 0 &&
             cas_segment(cas, x)->space == SPACE_DURABLE;
  for (x = cas->nslots; x < D_SIZE / D_SLOT; x += CAS_SEGMENT)
    had[x] = 0;
  err = nbdserve_cas_gc(cas, &bytes, rnd(2) ? m_progress : NULL, NULL);
  int may_be = !d_full && !d_fault.fired && refused == d_refused;
  for (x = 0; x < cas->nslots && may_be; x += CAS_SEGMENT) /* (C18) */
    if (had[x] && cas_segment(cas, x)->npages &&
        cas_segment(cas, x)->space < SPACE_DURABLE)
      m_fail("gc gave back what segment %u has beside pages", x);
  d_full |= was_full;
  if (err == -EOPNOTSUPP && d_nofallocate) return 0;
  if (err == -EUCLEAN && m_hurt.any) return 0;
  if (err && !m_excused_but(err)) m_fail("%d", err);
  return err;
}

/* A change of any kind, which may be impossible */
static void m_any_change(const struct m_vol *v) {
  change.size = rnd(4) ? 1 + rnd(m_max / 8) : rnd(m_max + 1);
  if (rnd(2)) change.size += (PER - change.size % PER) % PER;
  if (!change.size || change.size > CELLS) change.size = m_max - 1;
  change.kind = CREATE + (int)rnd(RM);
  if (rnd(3) == 0) change.kind = v->name[0] ? SNAPSHOT : CREATE;
  m_name(change.from, change.kind == CLONE && rnd(2));
  m_name(change.name, change.kind == SNAPSHOT || change.kind == ROLLBACK ||
                          (change.kind == RM && rnd(4)) ||
                          (change.kind == RESIZE && rnd(8) == 0));
  if (change.kind == RESIZE && m_find(change.name) && rnd(2))
    change.size = m_find(change.name)->size / 2; /* there may be something */
}

#if M_NEW
static int m_repair(void) {
  int err;
  m_do("repair");
  memset(m_named, 0, sizeof m_named);
  err = nbdserve_cas_repair(cas, NULL, m_damage, NULL, NULL);
  return m_verified(err);
}

/* Fills a volume that has no name before it is complete. */
static int m_import(void) {
  static uint32_t values[CELLS];
  struct m_vol *v = vols + NVOLS;
  int err, keep, taken, n = (int)rnd(6);
  char name[16];
  uint32_t at, len;
  if (!m_find("")) return 0;
  memset(v, 0, sizeof *v);
  m_settle(v, 0, CELLS);
  m_name(name, 0);
  v->size = 1 + rnd(m_max / 2);
  taken = m_find(name) != NULL;
  m_do("import %s, %u cells", name, v->size);
  err = nbdserve_cas_begin(cas, name, (uint64_t)v->size * CELL, &v->e);
  if (taken && err != -EEXIST && !m_excused(err))
    m_fail("begin: %d, though it exists", err);
  if (err && !taken && !m_excused(err)) m_fail("begin: %d", err);
  if (err) return err;
  v->is_open = 1;
  while (n-- > 0) {
    at = rnd(v->size);
    len = 1 + rnd(v->size - at);
    m_values(values, len);
    m_put(v, at, len, values, M_WRITE);
    if (rnd(4) == 0) m_meanwhile();
    if (rnd(8) == 0) m_flush(v);
    err = nbdserve_cas_create(cas, name, 4096);
    if (err != -EEXIST && !m_excused(err)) m_fail("create its name: %d", err);
    if (m_find(name) || !m_catalog()) m_fail("it can be seen");
  }
  keep = rnd(4) != 0;
  m_do("import %s: %s", name, keep ? "keep" : "drop");
  change.kind = keep ? IMPORT : 0;
  memcpy(change.name, name, sizeof name);
  v->is_open = 0;
  err = nbdserve_cas_finish(cas, &v->e, keep);
  if (err && !(keep ? m_excused(err) : m_excused_but(err)))
    m_fail("finish: %d", err);
  if (!err && keep) m_apply();
  if (!d_fault.fired || (m_strict && !d_stopped)) change.kind = 0;
  return err;
}

/* Several changes: all of them, or none */
static int m_changes(void) {
  struct nbdserve_cas_op ops[3];
  size_t failed = 99;
  int i, err, possible, places = 0;
  for (i = 0; i < NVOLS; i++)
    places += !vols[i].name[0];
  nmany = 2 + (int)rnd(2);
  if (places < nmany) return 0;
  for (i = 0; i < nmany; i++) {
    do
      m_any_change(vols + rnd(NVOLS));
    while (change.kind == RESIZE || change.kind == ROLLBACK || m_odd(&change));
    many[i] = change;
  }
  for (i = 0; i < NVOLS; i++)
    m_close(vols + i);
  for (i = 0; i < nmany; i++) {
    struct change *c = many + i;
    int from = c->kind == CLONE || c->kind == RENAME;
    ops[i].verb = c->kind;
    ops[i].name = from ? c->from : c->name;
    ops[i].to = from ? c->name : NULL;
    ops[i].size = (uint64_t)c->size * CELL;
  }
  change.kind = 0;
  possible = m_many(1);
  m_do("%d changes: %d %s %s, %d %s %s...: %d can be", nmany, many[0].kind,
       many[0].name, many[0].from, many[1].kind, many[1].name, many[1].from,
       possible);
  change.kind = MANY;
  err = nbdserve_cas_changes(cas, ops, (size_t)nmany, &failed);
  if (!err && possible < nmany) m_fail("they cannot succeed");
  if (err && possible == nmany && !m_excused(err)) m_fail("%d", err);
  if (err && possible < nmany && !m_excused(err) && failed != (size_t)possible)
    m_fail("number %lu failed, should be %d", (unsigned long)failed, possible);
  if (!err) m_apply();
  if (possible < nmany || !d_fault.fired || (m_strict && !d_stopped))
    change.kind = 0;
  return err;
}
#endif

/* ---- A peer, of kind PEER only ------------------------------------------- */

static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  sha_256(d_hw, p, NULL, n, sum, NULL);
}

/* Begins to talk to the peer, which has that.  Now and then it does not come to
 * the end, or one bit is wrong.  Returns whether it is so. */
static int n_talk(const struct far *far) {
  unsigned char *out = d_talk.out;
  size_t room = d_talk.room;
  memset(&d_talk, 0, sizeof d_talk);
  d_talk.out = out; /* of the one before it, maybe of one that was cut off */
  d_talk.room = room;
  d_talk.reverse = (int)rnd(2);
  far_begin(&d_talk, far);
  d_heard = 0;
  d_left = rnd(3) ? -1 : (long)rnd(8000 << rnd(5));
  d_wrong = rnd(6) ? -1 : (long)rnd(8000 << rnd(5));
  return d_left >= 0 || d_wrong >= 0;
}

/* The peer gets another snapshot: that of a volume of ours, mostly of one that
 * is sealed, with a few changes; or of its own. */
static void n_make(struct n_far *n) {
  struct m_vol *v = vols + rnd(NVOLS);
  uint32_t at, len, i;
  int k, tries;
  for (tries = 0; tries < 20 && !(v->name[0] && v->sealed); tries++)
    v = vols + rnd(NVOLS);
  far_free(&n->far);
  memset(n, 0, sizeof *n);
  if (v->name[0] && rnd(4)) {
    memcpy(n->cells, v->cur, sizeof n->cells);
    n->size = v->size;
    n->letter = v->name[0];
  } else {
    n->size = rnd(m_max) + 1;
  }
  for (i = 0; i < n->size; i++)
    if (n->cells[i] == LOST) n->cells[i] = 1;
  if (rnd(6) == 0) n->size = 1 + rnd(m_max);
  if (!n->size) n->size = 1 + rnd(100);
  for (k = (int)rnd(8); k > 0; k--) {
    static uint32_t values[CELLS];
    at = rnd(n->size);
    len = 1 + rnd(rnd(3) ? 3 * PER : 70 * PER);
    if (len > n->size - at) len = n->size - at;
    m_values(values, len);
    memcpy(n->cells + at, values, len * sizeof *values);
  }
  memset(n->cells + n->size, 0, (CELLS - n->size) * sizeof *n->cells);
  far_make(&n->far, BLOCK, CAS_FANOUT(BLOCK), (uint64_t)n->size * CELL);
  for (i = 0; i < n->size; i++)
    m_fill(n->far.b + n->far.data + i * CELL, n->cells[i]);
  far_seal(&n->far);
}

/* Removes what an interrupted pull has left. */
static int n_rm(struct n_far *n) {
  int err;
  m_do("rm %.15s", n->far.id);
  err = nbdserve_cas_rm(cas, n->far.part);
  m_must = 1;
  if (err && !m_excused(err)) m_fail("%d", err);
  m_must = 0;
  if (!m_catalog()) m_fail("removing a part changes the catalog");
  if (!err && n->is_partial) m_fail("it is still there");
  n_count[5] += !err;
  return err;
}

/* A snapshot that the peer has, mostly one that was not pulled as yet */
static struct n_far *n_choose(void) {
  struct n_far *n = n_fars + rnd(NFARS);
  if (n->far.b && rnd(3)) return n;
  if (n->far.b && !m_catalog()) m_fail("the catalog");
  if (n->far.b && n->is_partial && (n_rm(n) || n->is_partial)) return n;
  n_make(n);
  return n;
}

/* Pulls it. */
static int n_pull(void) {
  struct m_vol *v;
  char name[16];
  int err, lies, i, places = 0, was_full = d_full, known = 0;
  const char *from;
  for (i = 0; i < NVOLS; i++)
    places += !vols[i].name[0];
  if (places < 2) return 0;
  n_far = n_choose();
  for (i = 0; i < 3; i++) {
    m_name(name, 1);
    if (n_far->letter && rnd(3)) name[0] = n_far->letter;
    if (!(v = m_find(name))) break;
  }
  for (i = 0; i < NVOLS; i++)
    known |= vols[i].name[0] && vols[i].sealed == 1 &&
             !strcmp(vols[i].id, n_far->far.id);
  from = rnd(2) ? n_far->far.id : "there@s";
  d_room = rnd(20) ? UINT64_C(1) << 30 : UINT64_C(65) << 20;
  lies = n_talk(&n_far->far);
  m_do("pull %s, %u cells, of %.15s: hangs up at %ld, a wrong byte at %ld",
       name, n_far->size, n_far->far.id, d_left, d_wrong);
  d_full = 0;
  change.kind = PULL;
  change.size = n_far->size;
  change.from[0] = 0;
  memcpy(change.name, name, sizeof name);
  if (v) change.kind = 0;
  n_count[0]++;
  err = nbdserve_cas_pull(cas, name, from, FAR_PEER(D_PEER, D_PEER));
  d_full |= was_full;
  if (v) {
    int is_same = v->sealed && !strcmp(v->id, n_far->far.id);
    if (err != -EEXIST && !(is_same && !err) && !lies && !m_excused(err))
      m_fail("%d, though it exists", err);
    return 0;
  }
  if (!err) {
    n_count[known ? 2 : 1]++;
    m_apply();
    if (!m_catalog()) m_fail("it is not there");
    if (n_far->is_partial && !known) m_fail("it is there, and so is a part");
  } else {
    n_count[err == -ENOSPC ? 4 : 3]++;
    n_days();
    if (!(lies && (err == -EPIPE || err == -EBADMSG || err == -EPROTO ||
                   err == -EIO || err == -EINVAL || err == -ENOENT)) &&
        !(err == -ENOSPC && d_room < 1 << 30) && !m_excused(err))
      m_fail("%d", err);
    change.kind = 0;
    if (!m_catalog()) m_fail("something of it is to be seen");
    n_sound();
    if (err != -ENOSPC || d_room < 1 << 30) err = 0;
  }
  return err;
}

/* Eight days go by, and what nobody has gone on with is removed. */
static int n_gc(void) {
  int i, err, was[NFARS];
  if (!m_catalog()) m_fail("the catalog");
  for (i = 0; i < NFARS; i++)
    was[i] = n_fars[i].is_partial;
  d_days += 1 + rnd(9);
  err = m_gc();
  if (!m_catalog()) m_fail("the catalog");
  for (i = 0; i < NFARS; i++) {
    int is_old = n_fars[i].day + 7 < d_days;
    if (was[i] && !n_fars[i].is_partial && !is_old)
      m_fail("what was gone on with %u days ago is removed",
             (unsigned)(d_days - n_fars[i].day));
    if (was[i] && n_fars[i].is_partial && is_old && !err)
      m_fail("it is old, and still there");
    n_count[6] += was[i] && !n_fars[i].is_partial;
  }
  return err;
}

static unsigned char *n_keep;

/* Has all that has rotted mended by the peer. */
static int n_mend(void) {
  struct far far;
  int n = m_hurt.n < NHURT ? m_hurt.n : NHURT, i, err, lies;
  uint32_t c;
  far_make(&far, BLOCK, CAS_FANOUT(BLOCK), (uint64_t)(n + 1) * BLOCK);
  for (i = 0; i < n; i++)
    for (c = 0; c < PER; c++)
      m_fill(far_block(&far, (uint64_t)i) + c * CELL, m_hurt.cells[i][c]);
  far_seal(&far);
  lies = n_talk(&far);
  m_do("repair");
  memset(m_named, 0, sizeof m_named);
  free(n_keep);
  n_keep = far.b; /* a cut comes back without this frame */
  err =
      nbdserve_cas_repair(cas, FAR_PEER(D_PEER, D_PEER), m_damage, NULL, NULL);
  if (err && err != -EUCLEAN && lies) return 0;
  err = m_verified(err);
  if (err || lies) return err;
  for (i = 0; i < NVOLS; i++)
    for (c = 0; c < CELLS / PER; c++)
      if (vols[i].name[0] && m_named[i][c])
        m_fail("block %u of %s is not mended", c, vols[i].name);
  n_count[7] += m_hurt.n;
  m_hurt.n = m_hurt.any = m_hurt.fresh = m_hurt.slot = 0;
  return 0;
}

static int n_one(void) {
  uint32_t what = rnd(100), i;
  if (m_hurt.any && what < 40) return n_mend();
  if (what < 70) return n_pull();
  if (what < 80) return n_gc();
  for (i = 0; i < 20; i++) {
    struct m_vol *v = vols + rnd(NVOLS);
    if (v->name[0] && v->readonly && !v->sealed) return m_seal(v);
  }
  return 0;
}

/* One operation of any kind; an error that was in order, or 0 */
static int m_one(void) {
  static uint32_t values[CELLS];
  struct m_vol *v = vols + rnd(NVOLS);
  uint32_t at, n, what = rnd(100);
  int err = 0;
  if (rnd(20) == 0) d_run();
  if (d_kind == PEER && rnd(5) == 0) return n_one();
  if (!v->name[0] || rnd(100) < (uint32_t)m_weight[0]) {
    m_any_change(v);
    return m_change();
  }
  if (rnd(d_kind == TAKEN ? 20 : 80) == 0) return m_gc();
#if M_NEW
  if (rnd(60) == 0) return m_changes();
  if (rnd(60) == 0) return m_import();
  if (rnd(60) == 0) return m_repair();
#endif
  if (rnd(100) < (uint32_t)m_weight[1]) return m_do("flush"), m_flush(v);
  if (!v->size) return 0;
  at = rnd(v->size);
  n = 1 + rnd(rnd(8) ? 3 * PER : 70 * PER);
  if (what < 60) at -= at % PER, n += PER - n % PER;
  if (n > v->size - at) n = v->size - at;
  m_do("%u: %s block %u cell %u, %u cells", what, v->name, at / PER, at % PER,
       n);
  if (what < 80 && !v->readonly) {
    m_values(values, n);
    m_put(v, at, n, values, M_WRITE);
  } else if (what < 90 && !v->readonly) {
    memset(values, 0, n * sizeof *values);
    m_put(v, at, n, values, what < 85 ? M_ZERO : M_TRIM);
  } else if (what < 94) {
    err = m_read(v, at, n, values);
    for (; !err && n-- > 0;)
      if (values[n] != v->cur[at + n] &&
          v->cur[at + n] != LOST && /* repair may have mended it since */
          !(v->bad[(at + n) / PER] & VAGUE))
        m_fail("wrong data");
  } else if (what < 96) {
    err = m_verify();
  } else if (what < 97) {
    err = m_again(v);
  } else if (what < 98) {
    m_close(v);
  } else {
    err = v->readonly && rnd(3) ? m_seal(v) : m_diff(v, vols + rnd(NVOLS));
  }
  return err;
}

/* ---- What must be true of the disk whenever nothing is under way ----------
 *
 * ck_disk reads what the disk has, or would have after a cut, as the format
 * says, not by the store's own code, and compares it with what the store has in
 * memory: so a write that is forgotten, or comes too early or too late, shows
 * at once and not only when the power is cut in the right moment. */

enum {
  K_VOLS = 32,
  K_BLOCKS = 8 * 8 * 8 * 8, /* that a volume may have */
  K_DEEP = 4 /* each so many steps all pages and the log are read */
};
static const unsigned char *k_disk; /* d_now or d_durable */
static struct {
  struct cas_record record;
  uint32_t slot[K_BLOCKS]; /* of each block */
} k_vols[K_VOLS];          /* those of the catalog on the disk */
static int k_nvols;
static unsigned char k_was_page[D_SIZE / D_SLOT];
static unsigned char k_named[D_SIZE / D_SLOT];   /* slots; 1: page, 2: data */
static unsigned char k_sum[D_SIZE / D_SLOT][32]; /* of pages, when last seen, */
static uint64_t k_deep;           /* after the checkpoint with that number */
static uint32_t k_mine[K_BLOCKS]; /* of a volume in memory */
/* The checkpoint after which a change failed: the pages of the catalog that it
 * has made dirty have no pairs as yet. */
static uint64_t k_tried;
static uint64_t k_last; /* number of the checkpoint that was seen last */

static int ck_bytes(void *to, uint64_t off, size_t len) {
  if (off + len > D_SIZE) return -1;
  memcpy(to, d_now + off, len);
  return 0;
}

static void ck_fail(const char *what, int line, uint32_t at) {
  m_fail("line %d: %s: of %u", line, what, at);
}

static void k_must(int is_true, const char *what, uint64_t at) {
  if (!is_true)
    m_fail("%s: %s: of %lu", k_disk == d_now ? "disk" : "medium", what,
           (unsigned long)at);
}

/* A page that the disk has, twice, and which is whole */
static const unsigned char *k_page(struct nbdserve_cas *st, uint32_t slot,
                                   int level, uint32_t index) {
  static unsigned char page[BLOCK], sum[32];
  const unsigned char *p = k_disk + d_at((long)slot, 1);
  uint32_t twin = slot + CAS_TWIN;
  k_must(slot % CAS_SEGMENT < CAS_TWIN && slot < st->super.nslots, "no page",
         slot);
  k_named[slot] = k_named[twin] = 1;
  memcpy(page, p, BLOCK);
  k_must(cas_sum_page(d_hw, page, BLOCK, sum), "the sum of a page", slot);
  k_must(!memcmp(p, k_disk + d_at((long)twin, 1), BLOCK), "its twin", slot);
  k_must(!memcmp(sum, k_disk + d_at((long)slot, 0), 32), "its digest", slot);
  k_must(!memcmp(sum, k_disk + d_at((long)twin, 0), 32), "its other digest",
         slot);
  k_must(u_get32(p) == (level < CAS_LEVELS ? CAS_MAP : CAS_CAT) &&
             u_get32(p + 4) == (uint32_t)level && u_get32(p + 8) == index &&
             u_get64(p + 12) <= st->super.number,
         "its head", slot);
  /* One that is new has the number of a checkpoint that is (C17). */
  if (k_disk == d_now && memcmp(k_sum[slot], sum, 32)) {
    k_must(k_deep == UINT64_MAX || u_get64(p + 12) > k_deep,
           "the number of a new page", slot);
    memcpy(k_sum[slot], sum, 32);
  }
  return p + CAS_HEAD;
}

/* Fills in the slots of the blocks below a page. */
static void k_map(struct nbdserve_cas *st, uint32_t slot, int level,
                  uint32_t index, uint32_t *to) {
  const unsigned char *p;
  uint32_t below = level == 3 ? 512 : level == 2 ? 64 : level == 1 ? 8 : 1, c;
  if (!slot) return;
  p = k_page(st, slot, level, index);
  for (c = 0; c < 8; c++)
    if (level)
      k_map(st, u_get32(p + 4 * c), level - 1, 8 * index + c, to + c * below);
    else
      to[c] = u_get32(p + 4 * c);
}

/* Loads the catalog of the disk, with its maps. */
static void k_catalog(struct nbdserve_cas *st, uint32_t slot, int level,
                      uint32_t index) {
  static uint32_t unused[K_BLOCKS];
  const unsigned char *p;
  uint32_t c;
  if (!slot) return;
  p = k_page(st, slot, level, index);
  for (c = 0; level > CAS_LEVELS && c < 8; c++)
    k_catalog(st, u_get32(p + 4 * c), level - 1, 8 * index + c);
  for (c = 0; level == CAS_LEVELS && c < st->per_page; c++) {
    struct cas_record *record = &k_vols[k_nvols].record;
    cas_decode(cas_record_sizes, p + c * CAS_RECORD, record);
    if (!record->id) continue;
    k_must(k_nvols < K_VOLS - 1, "too many volumes", record->id);
    memset(k_vols[k_nvols].slot, 0, sizeof k_vols->slot);
    k_map(st, (uint32_t)record->root, 3, 0, k_vols[k_nvols++].slot);
    memset(unused, 0, sizeof unused);
    k_map(st, (uint32_t)record->digests, 3, 0, unused);
    for (uint32_t i = 0; i < K_BLOCKS; i++)
      if (unused[i]) k_named[unused[i]] = 2;
  }
}

static int k_volume(uint64_t id) {
  int i = 0;
  while (i < k_nvols && k_vols[i].record.id != id)
    i++;
  return i < k_nvols ? i : -1;
}

static uint32_t k_blocks(int i) {
  return (uint32_t)((k_vols[i].record.size + BLOCK - 1) / BLOCK);
}

/* The log page of a number at its place, or NULL; deep: its sum is looked at */
static const unsigned char *k_log_page(struct nbdserve_cas *st, uint64_t seq,
                                       int deep, struct cas_log_head *head) {
  const unsigned char *p = k_disk + cas_log_off(st, seq);
  uint32_t mixed[2][SHA_STATE_WORDS];
  unsigned char sum[32];
  cas_decode(cas_log_sizes, p + CAS_LOG_HEAD, head);
  if (head->magic != CAS_LOG || head->seq != seq || head->count > CAS_ENTRIES)
    return NULL;
  if (deep) cas_log_sum(st, p, 0, (uint32_t)head->count, mixed, sum);
  return deep && memcmp(sum, p + CAS_LOG_SUM, 32) ? NULL : p;
}

/* Applies the pages of the log before a number to what the catalog has. */
static void k_replay(struct nbdserve_cas *st, uint64_t end) {
  struct cas_log_head head;
  struct cas_entry entry;
  const unsigned char *p;
  uint64_t seq, n;
  uint32_t i;
  for (seq = st->super.replay; seq < end; seq++) {
    p = k_log_page(st, seq, 1, &head);
    k_must(p != NULL, "a page of the log", seq);
    k_must(head.durable <= st->durable && head.super <= st->super.number,
           "what a page of the log says", seq);
    k_must(seq == st->seq || head.count, "a closed page of the log", seq);
    for (i = 0; i < head.count; i++) {
      cas_decode(cas_entry_sizes, p + i * CAS_ENTRY, &entry);
      int v = k_volume(entry.volume);
      if (v < 0 || entry.block >= k_blocks(v)) continue;
      n = u_min(entry.slot ? 1 : u_get64(entry.digest),
                k_blocks(v) - entry.block);
      for (; n-- > 0; entry.block++)
        k_vols[v].slot[entry.block] = (uint32_t)entry.slot;
    }
  }
}

/* The slots of the blocks below a node in memory */
static void k_memory(struct nbdserve_cas *st, const struct cas_node *node,
                     uint32_t *to) {
  const unsigned char *page;
  uint32_t c, below;
  if (!node) return;
  below = node->level == 3 ? 512 : node->level == 2 ? 64 : 8;
  for (c = 0; node->level && c < node->nkids; c++)
    k_memory(st, node->kid[c], to + c * below);
  if (node->level) return;
  page = node->slots ? NULL : ck_page(st, node->slot) + CAS_HEAD;
  for (c = 0; c < 8; c++)
    to[c] = page ? u_get32(page + 4 * c) : node->slots[c];
}

/* What a kill leaves is what is in memory (C3, C15, C16). */
static void k_compare(struct nbdserve_cas *st) {
  uint32_t at, i;
  int n = k_nvols;
  for (at = 0; at < st->nvolumes; at++) {
    const struct cas_volume *vol = st->volumes[at];
    int v = k_volume(vol->id);
    const struct cas_record *record = &k_vols[v < 0 ? 0 : v].record;
    int is_partial;
    k_must((v < 0) == !vol->now.id, "a volume that is hidden, or not", vol->id);
    if (v < 0) continue;
    n--;
    /* When a part was gone on with last is written with the next change. */
    is_partial = vol->now.flags == CAS_IS_PARTIAL;
    k_must(record->flags == vol->now.flags && record->size == vol->now.size &&
               record->id == vol->now.id &&
               (record->created == vol->now.created || is_partial) &&
               record->made_from == vol->now.made_from &&
               record->levels == CAS_LEVELS &&
               !memcmp(record->cid, vol->now.cid, 32) &&
               !strcmp(record->name, vol->now.name),
           "its record", vol->id);
    memset(k_mine, 0, sizeof k_mine);
    k_memory(st, *cas_root(vol), k_mine);
    for (i = 0; i < k_blocks(v); i++)
      k_must(k_mine[i] == k_vols[v].slot[i] ||
                 (is_partial && !k_vols[v].slot[i]), /* it is adopted */
             "a block of a volume", i);
    for (; vol->parent && i < K_BLOCKS; i++)
      k_must(!k_mine[i], "a block behind the end of a snapshot", i);
  }
  k_must(n == 0, "volumes that are no more", (uint64_t)n);
}

/* What is named by what a cut leaves is not free, nor has it been written since
 * (C1, C5, C6). */
static void k_kept(struct nbdserve_cas *st) {
  unsigned char sum[32];
  uint32_t slot;
  int v;
  for (v = 0; v < k_nvols; v++)
    for (slot = 0; slot < k_blocks(v); slot++)
      if (k_vols[v].slot[slot]) k_named[k_vols[v].slot[slot]] = 2;
  for (slot = 1; slot < st->nslots; slot++) {
    uint32_t tag = CAS_AT(st, slot, tag);
    if (!k_named[slot]) continue;
    k_must(CAS_AT(st, slot, refs) != 0, "what is named is free", slot);
    k_must((k_named[slot] == 1) == (tag == TAG_PAGE || tag == TAG_RETIRED),
           "what is named is taken for something else", slot);
    k_must(!memcmp(d_now + d_at(slot, 1), k_disk + d_at(slot, 1), BLOCK) &&
               !memcmp(d_now + d_at(slot, 0), k_disk + d_at(slot, 0), 32),
           "what is named is written", slot);
    if (k_named[slot] == 1) continue;
    sha_256(d_hw, d_now + d_at(slot, 1), NULL, BLOCK, sum, NULL);
    k_must(!memcmp(sum, k_disk + d_at(slot, 0), 32), "its data", slot);
  }
}

/* Both superblocks say what memory does, and no place of the log has a page
 * that is to come. */
static void k_places(struct nbdserve_cas *st) {
  unsigned char p[D_SLOT] = {0};
  struct cas_log_head head;
  uint64_t seq;
  cas_encode(cas_super_sizes, &st->super, p);
  k_must(!memcmp(p, k_disk, CAS_SUPER_SUM), "the first superblock",
         st->super.number);
  k_must(!memcmp(k_disk, k_disk + CAS_UNIT, CAS_PAGE), "the second superblock",
         st->super.number);
  for (seq = st->seq + 1; seq < st->super.replay + st->super.log_pages; seq++)
    k_must(!k_log_page(st, seq, 0, &head), "a page that is to come", seq);
  if (st->nwritten && k_disk == d_now)
    k_must(k_log_page(st, st->seq, 1, &head) && head.count == st->nlog,
           "the open page of the log", st->seq);
}

/* Where a pair counts there is space, also after a cut (C18), and the index has
 * slots by their digests. */
static void k_space(struct nbdserve_cas *st) {
  uint32_t x;
  uint64_t p;
  for (x = 1; x < st->nslots; x++) {
    uint32_t tag = CAS_AT(st, x, tag) & ~CAS_GOOD;
    if (tag & TAG_INDEXED)
      k_must(tag == CAS_TAG(d_now + d_at((long)x, 0)), "a tag of the index", x);
    p = d_at((long)x, 1) / d_piece;
    /* A page goes where its pair has counted. */
    int is_page = CAS_AT(st, x, tag) == TAG_PAGE;
    if (is_page && !k_was_page[x] && k_tries && d_kind == PLAIN)
      k_must(cas_segment(st, x)->space >= SPACE_DURABLE, "a page", x);
    k_was_page[x] = (unsigned char)is_page;
    if (d_kind == TAKEN && cas_segment(st, x)->space == SPACE_DURABLE)
      k_must(d_has[p] && d_has_durable[p], "a segment without space", x);
  }
}

static void ck_disk(struct nbdserve_cas *st, int deep) {
  int i;
  if (d_kind == LOSTPAGE || m_hurt.any || d_frozen || d_fault.fired ||
      st->failed)
    return;
  k_disk = d_now;
  k_space(st);
  for (i = 0; i < 2; i++) {
    k_disk = i ? d_durable : d_now;
    k_places(st);
    if (!deep) continue;
    k_nvols = 0;
    memset(k_named, 0, sizeof k_named);
    k_catalog(st, (uint32_t)st->super.catalog, CAS_TOP, 0);
    k_replay(st, i ? st->durable : st->seq + (st->nwritten > 0));
    if (i)
      k_kept(st);
    else
      k_compare(st);
  }
  if (deep) k_deep = st->super.number;
}

/* Everything that must be true between two calls */
static void m_sound(void) {
  int is_lenient = d_fault.fired || m_hurt.any || d_kind == LOSTPAGE;
  if (!cas || !cas->is_open) return;
  if (d_fault.nth && !d_fault.fired) return; /* as in the last history */
  cas_check(cas, is_lenient ? CK_LENIENT : 0);
  if (!is_lenient && d_kind != SCARCE && !cas->failed && !cas->readonly &&
      cas->super.number != k_tried)
    k_must(cas->npairs >= cas->ndirty, "too few pairs for what is dirty",
           cas->npairs); /* (C20) */
  ck_disk(cas, m_nth % K_DEEP == 0);
  k_must(cas->super.number >= k_last, "an older checkpoint", k_last);
  if (cas->readonly) return; /* what it sees, a cut may take yet */
  /* Pages of one that failed are left, and must not be taken for its. */
  if (cas->super.number != k_last)
    k_must(cas->super.number > k_tries, "a number that was used", k_tries);
  k_last = cas->super.number;
  k_tries = cas->last_number;
}

static int m_step(void) {
  int err = m_one();
  if (err && cas) k_tried = cas->super.number;
  m_sound();
  return err;
}

/* How much there is: for so many slots, or more than will be needed; and on
 * what the store is. */
static void m_space(uint32_t slots) {
  uint64_t need = d_at((long)slots, 1) + rnd(3 * BLOCK);
  d_device = d_kind == FULL ? (int)rnd(2) : 0;
  d_nofallocate = d_kind == TAKEN && rnd(4) == 0;
  d_piece = rnd(2) ? 512 : 4096;
  memset(d_has, 0, sizeof d_has);
  memset(d_has_durable, 0, sizeof d_has_durable);
  d_pool = (uint32_t)(need / d_piece) + 1;
  d_taken = 0;
  if (slots) d_limit = d_kind == FULL ? need : D_SIZE;
  if (d_kind == SCARCE) d_limit = D_SIZE;
  if (!d_device) return;
  d_exists = d_entered = 1;
  d_nops = 0;
  d_used = 0;
  d_size = d_durable_size = d_limit;
  memset(d_now, 0, D_SIZE);
  memset(d_durable, 0, D_SIZE);
}

/* A new store on a new disk */
static int m_new(uint64_t seed) {
  struct nbdserve_cas_options o = {0};
  int i, err;
  m_seed = seed;
  d_seed = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
  for (i = 0; i < 8; i++)
    rnd(2);
  d_entries = 2 + rnd(6);
  m_forget();
  memset(d_calls, 0, sizeof d_calls);
  memset(&m_hurt, 0, sizeof m_hurt);
  memset(d_gone, 0, sizeof d_gone);
  memset(d_bad, 0, sizeof d_bad);
  memset(&d_scarce, 0, sizeof d_scarce);
  memset(m_refused, 0, sizeof m_refused);
  d_exists = nlater = m_over = d_stopped = 0;
  d_lose = d_asked = d_refused = 0;
  k_deep = UINT64_MAX;
  k_last = 0;
  d_set_clock(m_seed * 7919);
  m_flight = m_acked = 0;
  m_nth = m_last = 0;
  for (i = 0; i < NFARS; i++) {
    far_free(&n_fars[i].far);
    memset(n_fars + i, 0, sizeof *n_fars);
  }
  d_days = 0;
  d_room = UINT64_C(1) << 30;
  change.kind = 0;
  for (i = 0; i < NVOLS; i++)
    vols[i].name[0] = 0;
  m_weight[0] = (int)(rnd(3) ? 2 + rnd(10) : 40);
  m_weight[1] = (int)(rnd(3) ? 5 + rnd(20) : 1);
  d_limit = D_SIZE >> rnd(3);
  m_max = (rnd(3) ? CELLS / PER : 30) * PER;
  o.block_size = BLOCK;
  o.log_pages = 8 + rnd(9);
  if (d_kind == FULL || d_kind == TAKEN) {
    o.log_pages = 60 + rnd(60);
    d_entries = 2 + rnd(30);
    m_max = CELLS;
    m_weight[0] = 1 + (int)rnd(6);
    m_weight[1] = 10 + (int)rnd(20);
  }
  d_meta = 2 * CAS_UNIT + o.log_pages * 4096;
  m_space(d_kind == FULL || d_kind == TAKEN ? 150 + rnd(450) : 0);
  m_do("init");
  err = nbdserve_cas_init("/sim/store", &o);
  if (err && !m_excused(err)) m_fail("init: %d", err);
  if (!err && d_fds) m_fail("init leaves a descriptor open");
  return err;
}

/* simulator KIND [CUTS [SEED [trace]]]: cuts the power in the midst of random
 * histories, opens the store again, sees what is left, and goes on.  CUTS 0:
 * for ever.  KIND cuts: a mixture of all. */
static int made; /* the store */
static struct {
  long seeds;      /* histories */
  long cuts;       /* in them */
  long recoveries; /* when it was opened */
} c_count[NKINDS];
/* In format 1 only the first of them is as it should be. */
static const enum kind c_mixture[] = {
    PLAIN,    PLAIN,  PLAIN,  PLAIN,  PLAIN,  PLAIN, SCARCE,
    SCARCE,   FULL,   FULL,   FULL,   TAKEN,  SUPER, LOSTPAGE,
    LOSTPAGE, SECTOR, KILLED, KILLED, KILLED, KILLED};

/* Opens it, with all writes done. */
static void c_open(void) {
  int err;
  d_scarce.to = 0;
  m_refused[0] = m_refused[1] = m_refused[2] = d_refused;
  err = m_reopen();
  if (err) m_fail("open: %d", err);
}

/* Now and then the power is cut right after the store was closed, which makes
 * all durable that was acknowledged.  What comes later does not hang on it: the
 * histories that are known to find something are the same as before. */
static void c_closed(void) {
  uint64_t seed = d_seed;
  int how = (int)rnd(POWER);
  if (rnd(2)) {
    m_do("cut %d after the close, %d calls not synced", how, d_nops);
    d_cut(how);
    m_acked = 0;
  }
  d_seed = seed;
}

/* Until the power is cut, or to the end. */
static void c_live(uint64_t seed) {
  int i, steps = 400;
  if (!made) m_new(seed);
  made = 1;
  c_open();
  c_count[d_kind].recoveries++;
  m_check();
  if (rnd(3)) d_lose = 1 + (long)rnd(rnd(2) ? 10 : 200);
  d_lose_digest = (int)rnd(2);
  d_scarce.from = d_asked + (long)rnd(200);
  d_scarce.to = d_scarce.from + (long)rnd(200);
  d_scarce.n = 1 + (long)rnd(6);
  for (i = 0; i < steps; i++) {
    if (d_taken && rnd(100) == 0) {
      d_pool += d_taken;
      d_taken = 0;
    }
    m_step();
  }
  d_fuse = 0;
  m_do("close");
  if (!m_shut()) c_closed();
}

/* The last of a life: it opens, and volumes can be emptied and removed, though
 * there is no space; then there is some. */
static void c_end(void) {
  static uint32_t values[CELLS];
  struct m_vol *v;
  int i;
  c_open();
  m_check();
  for (v = vols; v < vols + NVOLS; v++)
    if (v->name[0] && !v->readonly && v->size && rnd(2)) {
      m_do("trim all of %s", v->name);
      memset(values, 0, sizeof values);
      m_put(v, 0, v->size, values, M_TRIM);
      m_flush(v);
    }
  for (i = 0; i < 2; i++)
    for (v = vols; v < vols + NVOLS; v++) {
      if (!v->name[0] || (!i && !v->readonly)) continue;
      change.kind = RM;
      memcpy(change.name, v->name, sizeof v->name);
      change.from[0] = 0;
      m_change();
    }
  d_pool += d_taken;
  d_taken = 0;
  m_must = 1; /* and it is there for a new one, of half the slots */
  m_do("create one when all are gone");
  change.kind = CREATE;
  strcpy(change.name, "z");
  change.size = 40 * PER;
  if (nbdserve_cas_create(cas, "z", (uint64_t)change.size * CELL))
    m_fail("create when all are gone");
  m_apply();
  v = m_find("z");
  for (i = 0; i < 40 * PER; i++)
    values[i] = 100 + ++m_last;
  m_do("fill it");
  m_put(v, 0, v->size, values, M_WRITE);
  m_flush(v);
  m_must = 0;
  m_check();
  m_shut();
}

/* Reads what is there without changing it. */
static void c_look(void) {
  static struct m_vol saved[NVOLS];
  struct nbdserve_cas_options o = {0};
  struct change was = change;
  int n = nlater, acked = m_acked, flight = m_flight, err;
  static char kept[sizeof later];
  memcpy(saved, vols, sizeof saved);
  memcpy(kept, later, sizeof later);
  d_frozen = 1;
  o.flags = NBDSERVE_CAS_READONLY;
  if (m_hurt.any) o.flags |= NBDSERVE_CAS_VERIFY;
  m_do("open read-only");
  err = nbdserve_cas_open("/sim/store", &o, &cas);
  if (err) m_fail("open read-only: %d", err);
  m_check();
  m_shut();
  d_frozen = 0;
  memcpy(vols, saved, sizeof saved);
  memcpy(later, kept, sizeof later);
  nlater = n;
  m_acked = acked;
  m_flight = flight;
  change = was;
}

/* A bit of a range is not what it was; not in its first bytes. */
static void c_rot(uint64_t off, uint64_t from, uint64_t len) {
  uint64_t at = off + from + rnd((uint32_t)(len - from));
  d_now[at] ^= (unsigned char)(1 << rnd(8));
  d_durable[at] = d_now[at];
}

/* What is in a slot may be lost. */
static void c_hurt(long x) {
  uint32_t i;
  for (i = 0; i < PER; i++)
    m_hurt.cells[m_hurt.n % NHURT][i] = m_number(d_now + d_at(x, 1) + i * CELL);
  m_hurt.n++;
}

/* One superblock is not what it was. */
static void c_super(void) {
  int which = (int)rnd(2), how = (int)rnd(5);
  uint64_t off = (uint64_t)which * CAS_UNIT, len = rnd(2) ? 512 : 4096;
  if (m_hurt.super) return; /* one at a time */
  m_hurt.super = 1 + which;
  m_do("superblock %d, %d, %lu bytes", off != 0, how, (unsigned long)len);
  m_hurt.any = 1;
  if (how < 2) {
    d_bad[0].off = off;
    d_bad[0].len = len;
    d_bad[0].passes = how;
  } else if (how < 4) { /* the first bytes say that it is ours */
    c_rot(off, 8, len);
  } else {
    memset(d_now + off, 0, 4096);
    memset(d_durable + off, 0, 4096);
  }
}

/* A slot that is or was used, for a page or data; 0: none was found */
static long c_slot(void) {
  long n = (long)((d_size - d_meta) / (D_SLOT + 32)), x;
  int tries, k, page = (int)rnd(2);
  if (d_size < d_meta || n < 2) return 0;
  for (tries = 0; tries < 50; tries++) {
    x = 1 + (long)rnd((uint32_t)n - 1);
    const unsigned char *p = d_now + d_at(x, 1);
    if (page)
      for (k = 0; k < (int)sizeof d_letters / 5; k++)
        if (!memcmp(p, d_letters[k], 4)) return x;
    if (!page && m_number(p) && m_number(p) != LOST) return x;
  }
  return 0;
}

/* One sector is not what it was: of the log, of digests, or a slot. */
static void c_sector(void) {
  int what = (int)rnd(8), rots = (int)rnd(2);
  uint64_t len = rnd(2) ? 512 : 4096, off;
  long x = c_slot(), i;
  if (!x || m_hurt.fresh) return; /* one at a time */
  for (i = 0; i < 2; i++)
    if (d_bad[i].len) rots = 1;
  if (what < 2) {
    off = 2 * CAS_UNIT +
          rnd((uint32_t)((d_meta - 2 * CAS_UNIT) / len)) * (uint32_t)len;
    m_hurt.log = 1;
  } else if (what < 3) {
    m_hurt.slot = 1;
    off = d_at(x, 0) / len * len;
    if (rots) { /* that of this one */
      off = d_at(x, 0);
      len = 32;
      c_hurt(x);
    } else {
      m_hurt.digests = 1;
    }
  } else {
    m_hurt.slot = 1;
    len = 512;
    off = d_at(x, 1);
    c_hurt(x);
  }
  if (off + len > d_size) return;
  m_hurt.fresh = 1;
  m_do("%s, byte %lu, slot %ld, %lu bytes, %s",
       what < 2   ? "log"
       : what < 3 ? "digests"
                  : "slot",
       (unsigned long)off, x, (unsigned long)len, rots ? "rot" : "awhile");
  m_hurt.any = 1;
  if (rots) {
    c_rot(off, 0, len);
  } else {
    d_bad[0].off = off;
    d_bad[0].len = len;
    d_bad[0].passes = (int)rnd(2);
  }
}

/* A page and its twin cannot be read, but when it is opened the next time they
 * can, and all is there.  Not what only looks like a page, as data that was to
 * take its place is lost: the log may name that, and its digest be there. */
static void c_twins(void) {
  struct nbdserve_cas_options o = {0};
  long x = c_slot();
  int i;
  if (!x || m_number(d_now + d_at(x, 1)) != LOST) return; /* no page */
#if M_NEW
  unsigned char page[BLOCK], sum[32];
  memcpy(page, d_now + d_at(x, 1), BLOCK);
  cas_sum_page(d_hw, page, BLOCK, sum);
  if (memcmp(sum, d_now + d_at(x, 0), 32)) return;
#endif
  m_do("slot %ld and its twin are unreadable once", x);
  for (i = 0; i < 2; i++, x ^= CAS_SEGMENT / 2) {
    d_bad[i].off = d_at(x, 1);
    d_bad[i].len = BLOCK;
  }
  o.flags = NBDSERVE_CAS_VERIFY;
  if (!nbdserve_cas_open("/sim/store", &o, &cas)) nbdserve_cas_close(cas);
  d_bad[0].len = d_bad[1].len = 0;
  m_forget();
}

/* The data of one slot has rotted, which a peer has. */
static void n_rot(void) {
  long x = c_slot();
  if (!x || m_number(d_now + d_at(x, 1)) == LOST || m_hurt.fresh) return;
  if (m_hurt.n >= NHURT) return;
  c_hurt(x);
  m_hurt.any = m_hurt.slot = m_hurt.fresh = 1;
  m_do("the data of slot %ld has rotted", x);
  c_rot(d_at(x, 1), 0, BLOCK);
}

/* What the cut was, and what else happens until it is opened again. */
static void c_after(int how) {
  int i;
  cuts++;
  c_count[d_kind].cuts++;
  if (how > KILL) how = 4; /* it shows the most */
  if (d_kind == KILLED && rnd(8)) how = KILL;
  m_do("cut %d, %d calls not synced", how, d_nops);
  m_acked &= how == KILL && d_kind == KILLED;
  d_fuse = 0;
  m_forget();
  d_cut(how);
  if (d_gone_super) m_hurt.super = d_gone_super;
  d_lost();
  for (i = 0; i < 2; i++)
    if (d_bad[i].passes) d_bad[i].len = 0;
  if (d_kind == TAKEN && rnd(2)) {
    d_taken += d_pool;
    d_pool = 0;
  }
  if (!made) return;
  if (d_kind == SUPER || d_kind == SECTOR) d_settle(NULL, 1, D_OPS);
  if (d_kind == SUPER && rnd(2)) c_super();
  if (d_kind == PEER && m_seed % 3 == 0 && rnd(3) == 0) n_rot();
  if (d_kind == SECTOR && rnd(6) == 0)
    c_twins();
  else if (d_kind == SECTOR && rnd(2))
    c_sector();
}

static int c_cuts(int kind, long want, uint64_t first) {
  static uint64_t seed; /* static: not lost in longjmp */
  static int lives, i;
  for (seed = first; !want || cuts < want; seed++) {
    made = 0;
    d_seed = seed * 77 + 12345;
    rnd(2);
    d_loses = seed % 4 == 1 || seed % 4 == 2;
    d_kind = (enum kind)kind;
    if (d_kind == NKINDS) d_kind = M_NEW ? c_mixture[rnd(20)] : PLAIN;
    c_count[d_kind].seeds++;
    for (lives = 1 + (int)rnd(rnd(2) ? 4 : 30); lives > 0; lives--) {
      alarm(60);
      d_fuse = 1 + (long)rnd(rnd(3) ? 30 << rnd(8) : 60);
      d_aim = rnd(3) == 0;
      if (!setjmp(d_out)) {
        c_live(seed);
        continue;
      }
      c_after((int)rnd(10));
      if (made && rnd(8) == 0) c_look();
      if (made) continue;
      if (d_exists && !nbdserve_cas_open("/sim/store", NULL, &cas)) m_shut();
      d_exists = 0;
    }
    if (made && (d_kind == FULL || d_kind == TAKEN || d_kind == SCARCE))
      c_end();
    else if (made && !d_fuse)
      m_forget();
  }
  for (i = 0; i < NKINDS; i++)
    if (c_count[i].seeds)
      printf("%s: %ld stores, %ld cuts, %ld recoveries\n", kinds[i],
             c_count[i].seeds, c_count[i].cuts, c_count[i].recoveries);
  if (c_count[PEER].seeds)
    printf(
        "%ld pulls, %ld of them complete, %ld copied, %ld ended by the peer, "
        "%ld without room; %ld parts removed, %ld too old; %ld mended\n",
        n_count[0], n_count[1], n_count[2], n_count[3], n_count[4], n_count[5],
        n_count[6], n_count[7]);
  printf("%ld cuts, %ld recoveries, %ld writes (%ld calls), %ld snapshots: "
         "no loss\n",
         cuts, recoveries, writes, d_writes, snapshots);
  return 0;
}

/* simulator calls [SEED [trace]]: one history after the other, each with one
 * call of one kind, the n-th, that fails, is interrupted, or does less; then
 * what was flushed is there, as is all that was not refused.  simulator errors:
 * only writes, and as those of data and pages are nobody's error but that of
 * who asked, all goes on. */
enum {
  STEPS = 60
};

/* Opens what the last process left behind, first with reads that fail, from
 * which nothing may get lost for good, then without faults. */
static void f_recover(int lost) {
  int legal = change.kind, i;
  m_forget();
  m_over = m_acked = d_stopped = 0;
  if (lost) d_cut((int)rnd(POWER));
  for (i = 0; i < 3; i++) {
    memset(&d_fault, 0, sizeof d_fault);
    memset(d_calls, 0, sizeof d_calls);
    d_fault.kind = PREAD;
    d_fault.nth = 1 + (long)rnd(150);
    d_fault.err = EIO;
    if (!m_reopen()) nbdserve_cas_close(cas);
    m_forget();
  }
  d_fault.nth = d_fault.fired = 0;
  if (m_reopen()) m_fail("no recovery");
  m_check();
  if (legal) m_do("recovered");
  m_shut();
  m_reopen();
  m_check();
  m_shut();
  m_forget();
}

/* After a failed sync what was written since the one before can be read until
 * the power goes, but never reaches the medium by itself.  Recovery believes
 * what it reads, so it has to write that once more (C10): then it is there
 * after a cut, too. */
static void f_believe(void) {
  m_forget();
  m_over = m_acked = d_stopped = 0;
  d_fault.nth = d_fault.fired = 0;
  if (m_reopen()) m_fail("no recovery after a failed sync");
  m_check();
  m_forget();
  d_cut(0);
  if (m_reopen()) m_fail("no recovery after a failed sync and a cut");
  m_acked = 0;
  m_check();
  m_shut();
  m_forget();
}

static void f_write(struct m_vol *v) {
  static uint32_t values[CELLS];
  m_do("fill %s", v->name);
  m_values(values, v->size);
  m_put(v, 0, v->size, values, M_WRITE);
}

/* True when the call was reached. */
static int f_history(uint64_t seed, int kind, long nth, int err) {
  int i, r, syncs = kind == SYNC || kind == FSYNC;
  memset(&d_fault, 0, sizeof d_fault);
  d_fault.kind = kind;
  d_fault.nth = nth;
  d_fault.err = err;
  d_fault.cut = 100;
  r = m_new(seed);
  m_max = 100 * PER;
  if (r && !d_fault.fired) m_fail("init: %d", r);
  if (r) {
    d_fault.nth = 0;
    d_exists = 0;
    m_forget();
    return 1;
  }
  r = m_reopen();
  if (!r) m_check();
  for (i = 0; !r && i < 3; i++) { /* something to work with */
    change.kind = CREATE + (i == 2);
    change.size = 75 * PER - (uint32_t)i;
    strcpy(change.name, i == 2 ? "b@0" : i ? "b" : "a");
    change.from[0] = 0;
    r = m_change();
    if (!r && i < 2) f_write(m_find(change.name));
  }
  m_weight[0] = 15;
  m_weight[1] = 15;
  for (i = 0; i < STEPS && cas && !m_over && !change.kind; i++)
    r = m_step();
  i = d_fault.fired;
  if (!cas && !i) m_fail("not opened: %d", r);
  if (cas && rnd(2)) m_shut(); /* else it is killed */
  if (i && syncs && err != EINTR && nth % 2) {
    f_believe();
    return i;
  }
  f_recover((syncs && err != EINTR) || rnd(2));
  return i;
}

static int f_calls(uint64_t seed, int only) {
  static const char *const names[NCALLS] = {"pread",     "pwrite",    "preadv",
                                            "pwritev",   "fdatasync", "fsync",
                                            "fallocate", "ftruncate", "malloc"};
  static const int errors[] = {EIO, ENOSPC, EINTR, 0 /* short */, ENOMEM};
  int i, kind;
  long n, all = 0;
  for (kind = 0; kind < NCALLS; kind++) {
    long sum = 0;
    for (i = 0; i < 5; i++) {
      if ((errors[i] == ENOMEM) != (kind == MALLOC)) continue;
      if (!errors[i] && kind >= SYNC) continue;
      if (only && (errors[i] == EINTR || !errors[i] ||
                   (kind != PWRITE && kind != PWRITEV && kind != FALLOCATE)))
        continue;
      if (errors[i] == ENOSPC && (kind == PREAD || kind == PREADV)) continue;
      for (n = 1; alarm(20), f_history(seed, kind, n, errors[i]); n++)
        sum++;
    }
    printf("%s %ld%s", names[kind], sum, kind < MALLOC ? ", " : "\n");
    fflush(stdout);
    all += sum;
  }
  return all < 100;
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  int kind = 0, only = !strcmp(what, "errors");
  long number = argc > 2 ? atol(argv[2]) : 0;
  uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
  m_signals();
  d_hw = os_has_hwsha();
  m_strict = only || M_NEW;
  if (only || !strcmp(what, "calls")) {
    m_trace = argc > 3;
    return f_calls(number ? (uint64_t)number : 1, only);
  }
  m_trace = argc > 4;
  while (kind < NKINDS && strcmp(what, kinds[kind]))
    kind++;
  if (kind == NKINDS && strcmp(what, "cuts")) return 2;
  return c_cuts(kind, argc > 2 ? number : 2000, seed);
}

//== mutate
/* Defends "a file that is not a sound store is refused, or as good as it can
 * be": forged and damaged stores, whose sums are right, so that what they say
 * is believed.  mutate COUNT SEED [CASE]
 *
 * Each case takes a sound store, changes 1 to 4 fields of it, and opens it: for
 * reading, for writing and once more.  No case may crash, hang, take much more
 * memory than the file has bytes, or make a later open worse: what could be
 * read before a change of something else is there after it.  The store is in
 * memory, and everything follows from SEED and the number of the case. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A store so small that all of it can be read in every case */
#define CAS_ENTRIES 6
#define CAS_RESERVE_PAIRS 12
#define CAS_UNIT 4096
#define CAS_FANOUT(bs) 8
#define CAS_SEGMENT 16
#define CAS_MAX_DIRTY 400
#define CAS_MARGIN 8
#define CAS_TRIES 12 /* 8 segments have their digests in one sector */
#define CAS_MIN_BLOCK 512

enum {
  F_MAX = 8 << 20, /* bytes that there are for the file */
  F_FD = 5000,
  F_DIR = 6000
};

static unsigned char f_now[F_MAX]; /* the file */
static uint64_t f_size;
static int f_exists;
static int f_frozen; /* it is open for reading only */

static struct { /* shared with the process that watches */
  long current; /* the case */
  char what[2000];
  size_t len; /* of what */
} * m_shared;

static size_t m_blocks; /* of memory, not given back */
static size_t m_bytes;  /* in these */
static size_t m_limit;
static uint64_t m_seed;

/* Ends the case. */
static void m_fail(const char *format, ...) {
  va_list ap;
  va_start(ap, format);
  printf("case %ld: ", m_shared->current);
  vprintf(format, ap);
  printf("\n");
  va_end(ap);
  fflush(stdout);
  _exit(1);
}

#define SO(condition) \
  ((condition) ? (void)0 : m_fail("line %d: not so: %s", __LINE__, #condition))

/* Takes note of a change, to tell if the case fails. */
static void m_note(const char *format, ...) {
  va_list ap;
  size_t room = sizeof m_shared->what - m_shared->len;
  va_start(ap, format);
  int n = vsnprintf(m_shared->what + m_shared->len, room, format, ap);
  va_end(ap);
  if (n > 0 && (size_t)n < room) m_shared->len += (size_t)n;
}

static uint32_t rnd(uint32_t n) { /* 0..n-1 */
  m_seed ^= m_seed << 13;
  m_seed ^= m_seed >> 7;
  m_seed ^= m_seed << 17;
  return (uint32_t)((m_seed * UINT64_C(0x2545f4914f6cdd1d)) >> 32) % n;
}

/* ---- The file ------------------------------------------------------------ */

static ssize_t f_move(int writing, int fd, const struct iovec *v, int n,
                      off_t off) {
  uint64_t at = (uint64_t)off;
  ssize_t all = 0;
  SO(fd >= F_FD && fd < F_DIR && off >= 0 && !(writing && f_frozen));
  for (; n > 0; n--, v++) {
    uint64_t limit = writing ? F_MAX : f_size;
    size_t len = v->iov_len;
    if (at >= limit) break;
    if (len > limit - at) len = (size_t)(limit - at);
    if (writing)
      memcpy(f_now + at, v->iov_base, len);
    else
      memcpy(v->iov_base, f_now + at, len);
    at += len;
    all += (ssize_t)len;
    if (writing && at > f_size) f_size = at;
  }
  if (writing && !all) {
    errno = ENOSPC;
    return -1;
  }
  return all;
}

static ssize_t sim_preadv(int fd, const struct iovec *v, int n, off_t off) {
  return f_move(0, fd, v, n, off);
}

static ssize_t sim_pwritev(int fd, const struct iovec *v, int n, off_t off) {
  return f_move(1, fd, v, n, off);
}

static ssize_t sim_pread(int fd, void *b, size_t n, off_t off) {
  struct iovec v = {b, n};
  return f_move(0, fd, &v, 1, off);
}

static ssize_t sim_pwrite(int fd, const void *b, size_t n, off_t off) {
  struct iovec v = {(void *)(uintptr_t)b, n};
  return f_move(1, fd, &v, 1, off);
}

static int sim_sync(int fd) {
  SO(fd >= F_FD);
  return 0;
}

static int sim_ftruncate(int fd, off_t size) {
  SO(fd >= F_FD && !f_frozen && size >= 0);
  if (size > F_MAX) {
    errno = EFBIG;
    return -1;
  }
  if ((uint64_t)size < f_size)
    memset(f_now + size, 0, (size_t)(f_size - (uint64_t)size));
  f_size = (uint64_t)size;
  return 0;
}

static int sim_fallocate(int fd, int mode, off_t off, off_t len) {
  uint64_t end = (uint64_t)(off + len);
  SO(fd >= F_FD && !f_frozen && off >= 0 && len > 0);
  if (!(mode & 1) && end > F_MAX) {
    errno = ENOSPC;
    return -1;
  }
  if ((mode & ~1) && end > f_size) end = f_size; /* PUNCH_HOLE, ZERO_RANGE */
  if ((mode & ~1) && end > (uint64_t)off)
    memset(f_now + off, 0, (size_t)(end - (uint64_t)off));
  if (!mode && end > f_size) f_size = end;
  return 0;
}

static int sim_open(const char *path, int flags, ...) {
  if (strcmp(path, "/sim/store") != 0) return F_DIR;
  if (f_exists && (flags & O_EXCL)) {
    errno = EEXIST;
    return -1;
  }
  f_exists = 1;
  return F_FD;
}

static int sim_close(int fd) {
  SO(fd >= F_FD);
  return 0;
}

static int sim_fstat(int fd, struct stat *st) {
  memset(st, 0, sizeof *st);
  st->st_mode = (fd == F_DIR ? S_IFDIR : S_IFREG) | 0644;
  st->st_size = (off_t)f_size;
  return 0;
}

static int sim_lstat(const char *path, struct stat *st) {
  (void)path;
  return sim_fstat(F_FD, st);
}

static int sim_flock(int fd, int how) {
  (void)how;
  SO(fd == F_FD);
  return 0;
}

static off_t sim_lseek(int fd, off_t off, int whence) {
  SO(fd >= F_FD);
  return whence == SEEK_END ? (off_t)f_size + off : off;
}

/* Time goes on by a millisecond at each look, so that cases are the same. */
static int sim_clock(clockid_t clock, struct timespec *t) {
  static long looks;
  (void)clock;
  looks++;
  t->tv_sec = 1700000000 + looks / 1000;
  t->tv_nsec = looks % 1000 * 1000000;
  return 0;
}

/* The store's thread is run as a call instead. */
static int sim_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *),
                      void *arg) {
  (void)t, (void)a, (void)f, (void)arg;
  return EAGAIN;
}

static int sim_wait(pthread_cond_t *c, pthread_mutex_t *m) {
  (void)c, (void)m;
  m_fail("it waits for nobody");
  return 0;
}

/* Memory with its length before it */
static void *sim_malloc(size_t n) {
  size_t *p;
  if (n > m_limit || m_bytes + n > m_limit)
    m_fail("%zu bytes of memory, and %zu more", m_bytes, n);
  p = malloc(2 * sizeof *p + n);
  if (!p) exit(2);
  p[0] = n;
  m_blocks++;
  m_bytes += n;
  memset(p + 2, 0xa5, n);
  return p + 2;
}

static void sim_free(void *p) {
  size_t *start = p;
  if (!p) return;
  start -= 2;
  m_blocks--;
  m_bytes -= start[0];
  free(start);
}

#undef open
#undef lseek
#undef fstat
#undef lstat
#undef pread
#undef pwrite
#undef preadv
#undef pwritev
#undef ftruncate
#undef fallocate
#define open sim_open
#define close sim_close
#define unlink(path) (f_exists = 0)
#define flock sim_flock
#define fstat sim_fstat
#define lstat sim_lstat
#define lseek sim_lseek
#define pread sim_pread
#define pwrite sim_pwrite
#define preadv sim_preadv
#define pwritev sim_pwritev
#define fdatasync sim_sync
#define fsync sim_sync
#define ftruncate sim_ftruncate
#define fallocate sim_fallocate
#define clock_gettime sim_clock
#define nanosleep(time, rest) ((void)(time))
#define time(p) 1700000000
#define pthread_create sim_create
#define pthread_cond_wait sim_wait
#define pthread_cond_timedwait(c, m, t) \
  ((void)(c), (void)(m), (void)(t), ETIMEDOUT)
#define NBDSERVE_MALLOC sim_malloc
#define NBDSERVE_FREE sim_free
#define NBDSERVE_NO_MAIN 1
#include "nbdserve.c"

/* ---- Sound stores ---------------------------------------------------------
 * Kept as files: two of a store that is open, with a log, and one closed. */

enum {
  X_BLOCK = 512,
  X_LEAF = 8 * X_BLOCK, /* bytes below a leaf */
  X_NSTORES = 3,
  X_NVOLS = 40,
  X_NAME = 340, /* bytes of the longest, with a NUL */
  X_MOST = 4096 /* blocks of the largest volume */
};

struct stored {
  unsigned char *bytes;
  uint64_t size;
};
static struct stored sound[X_NSTORES];

static struct nbdserve_cas *c_open(uint32_t flags, int *err) {
  struct nbdserve_cas_options o = {.flags = flags};
  struct nbdserve_cas *cas = NULL;
  f_frozen = (flags & NBDSERVE_CAS_READONLY) != 0;
  *err = nbdserve_cas_open("/sim/store", &o, &cas);
  return *err ? NULL : cas;
}

/* Writes a pattern, or zeroes, to a volume. */
static int c_write(struct nbdserve_cas *cas, const char *name, uint64_t off,
                   uint64_t len, uint32_t pattern) {
  struct nbdserve_export e = {0};
  unsigned char b[X_LEAF];
  int err = nbdserve_cas_volume(cas, name, &e);
  if (err) return err;
  for (uint64_t at = 0; at < len && !err; at += X_BLOCK) {
    uint64_t n = len - at < X_BLOCK ? len - at : X_BLOCK;
    for (size_t i = 0; i < X_BLOCK; i += 4)
      u_put32(b + i, pattern ? pattern + (uint32_t)at : 0);
    err = e.ops->write(e.ctx, b, off + at, n, 0);
  }
  e.ops->close(e.ctx);
  return err;
}

static void c_flush(struct nbdserve_cas *cas, const char *name) {
  struct nbdserve_export e = {0};
  SO(nbdserve_cas_volume(cas, name, &e) == 0);
  SO(e.ops->flush(e.ctx, 0) == 0);
  e.ops->close(e.ctx);
}

static void c_keep(struct stored *to) {
  to->bytes = malloc(f_size);
  if (!to->bytes) exit(2);
  memcpy(to->bytes, f_now, f_size);
  to->size = f_size;
}

/* Makes the sound stores. */
static void c_make(void) {
  struct nbdserve_cas_options o = {.block_size = X_BLOCK, .log_pages = 16};
  char name[16];
  char id[72];
  int err;
  m_limit = SIZE_MAX;
  SO(nbdserve_cas_init("/sim/store", &o) == 0);
  struct nbdserve_cas *cas = c_open(0, &err);
  SO(cas);
  SO(nbdserve_cas_create(cas, "a", 61 * X_BLOCK + 100) == 0);
  SO(c_write(cas, "a", 0, 50 * X_BLOCK, 1000) == 0);
  SO(nbdserve_cas_snapshot(cas, "a@1") == 0);
  SO(nbdserve_cas_seal(cas, "a@1", id, NULL, NULL) == 0);
  SO(c_write(cas, "a", 3 * X_BLOCK, 20 * X_BLOCK, 200000) == 0);
  SO(nbdserve_cas_snapshot(cas, "a@2") == 0);
  SO(nbdserve_cas_clone(cas, "a@1", "b") == 0);
  SO(c_write(cas, "b", 30 * X_BLOCK + 7, 9 * X_BLOCK, 300000) == 0);
  SO(nbdserve_cas_create(cas, "c", X_MOST * X_BLOCK) == 0);
  for (uint32_t i = 0; i < 12; i++)
    SO(c_write(cas, "c", i * 340 * X_BLOCK, 3 * X_BLOCK, 400000 + i * 999) ==
       0);
  for (int i = 0; i < 10; i++) {
    snprintf(name, sizeof name, "e%d", i);
    SO(nbdserve_cas_create(cas, name, 5 * X_BLOCK) == 0);
    if (i % 3 == 0) SO(c_write(cas, name, 0, X_BLOCK, 500000) == 0);
  }
  SO(nbdserve_cas_rm(cas, "e5") == 0);
  SO(c_write(cas, "a", 40 * X_BLOCK, 7 * X_BLOCK, 600000) == 0);
  SO(c_write(cas, "b", 3 * X_BLOCK, 5 * X_BLOCK, 0) == 0);
  c_flush(cas, "a");
  SO(c_write(cas, "c", 340 * X_BLOCK, 5 * X_BLOCK, 700000) == 0);
  c_keep(&sound[0]);
  c_flush(cas, "a");
  SO(c_write(cas, "e0", 0, 3 * X_BLOCK, 800000) == 0);
  c_flush(cas, "a");
  SO(c_write(cas, "e3", 0, 2 * X_BLOCK, 900000) == 0);
  c_keep(&sound[1]);
  SO(nbdserve_cas_close(cas) == 0);
  c_keep(&sound[2]);
  SO(m_blocks == 0);
}

/* ---- Changes ------------------------------------------------------------- */

/* Where things are in the file, as the format has it: see nbdserve.h */
enum {
  X_SUPER_ID = 16,
  X_SUPER_REPLAY = 40,
  X_SUPER_NSLOTS = 52,
  X_SUPER_SUM = 480,
  X_LOG_BEGIN = 2 * CAS_UNIT,
  X_LOG_PAGES = 16,
  X_LOG_PAGE = 4096, /* bytes */
  X_LOG_HEAD = 4032,
  X_LOG_COUNT = 4036,
  X_LOG_SEQ = 4040,
  X_LOG_SUM = 4064,
  X_ENTRY = 48,
  X_PAGE_LEVEL = 4,
  X_PAGE_INDEX = 8,
  X_PAGE_SUM = 20,
  X_PAGE_BODY = 32,
  X_SEGMENT = CAS_SEGMENT,
  X_TWIN = X_SEGMENT / 2,
  X_GROUP_BEGIN = X_LOG_BEGIN + X_LOG_PAGES * X_LOG_PAGE,
  X_GROUP_SLOTS = CAS_UNIT / 32,
  X_GROUP = CAS_UNIT + X_GROUP_SLOTS * X_BLOCK
};

/* A field: where it is, and its bytes */
struct field {
  const char *name;
  uint32_t off;
  uint32_t len;
};

static const struct field super_fields[] = {
    {"version", 8, 4},   {"block_size", 12, 4}, {"id", 16, 4},
    {"number", 32, 8},   {"replay", 40, 8},     {"log_pages", 48, 4},
    {"slots", 52, 4},    {"catalog", 56, 4},    {"next_id", 60, 4},
    {"incompat", 64, 4}, {"ro_compat", 68, 4},
};
static const struct field log_fields[] = {
    {"count", 4036, 4},
    {"seq", 4040, 8},
    {"durable", 4048, 8},
    {"super", 4056, 8},
};
static const struct field entry_fields[] = {
    {"volume", 0, 4},           {"slot", 4, 4}, {"slot", 4, 4}, {"block", 8, 8},
    {"count or digest", 16, 8},
};
static const struct field page_fields[] = {
    {"magic", 0, 4},
    {"level", 4, 4},
    {"index", 8, 4},
    {"number", 12, 8},
};
static const struct field record_fields[] = {
    {"id", 0, 4},      {"flags", 4, 4},    {"size", 8, 8},  {"root", 16, 4},
    {"levels", 20, 4}, {"created", 24, 8}, {"from", 32, 4}, {"digests", 36, 4},
    {"cid", 40, 8},    {"name", 112, 4},
};

static uint32_t x_pages[4000]; /* slots of pages, all of the sound store */
static uint32_t x_npages;
static uint32_t x_nslots;

static unsigned char *x_slot(uint32_t slot) {
  return f_now + X_GROUP_BEGIN + slot / X_GROUP_SLOTS * (size_t)X_GROUP +
         CAS_UNIT + slot % X_GROUP_SLOTS * (size_t)X_BLOCK;
}

static unsigned char *x_digest(uint32_t slot) {
  return f_now + X_GROUP_BEGIN + slot / X_GROUP_SLOTS * (size_t)X_GROUP +
         slot % X_GROUP_SLOTS * (size_t)32;
}

/* The sum of a page, the first 12 bytes of which stand in it */
static void x_sum(const unsigned char *p, unsigned char sum[32]) {
  unsigned char copy[X_BLOCK];
  memcpy(copy, p, X_BLOCK);
  memset(copy + X_PAGE_SUM, 0, 12);
  sha_256(0, copy, NULL, X_BLOCK, sum, NULL);
}

/* Takes a sound store, and finds its pages. */
static void x_take(const struct stored *from) {
  unsigned char sum[32];
  memcpy(f_now, from->bytes, from->size);
  memset(f_now + from->size, 0, F_MAX - from->size);
  f_size = from->size;
  x_nslots = u_get32(f_now + X_SUPER_NSLOTS);
  x_npages = 0;
  for (uint32_t slot = 1; slot < x_nslots; slot++) {
    x_sum(x_slot(slot), sum);
    if (slot % X_SEGMENT < X_TWIN &&
        !memcmp(x_slot(slot) + X_PAGE_SUM, sum, 12))
      x_pages[x_npages++] = slot;
  }
  SO(x_npages > 0);
}

/* A number that may be trouble, instead of one */
static uint64_t x_number(uint64_t was, uint32_t len) {
  static const uint64_t some[] = {
      0,          1,          2,          3,          5,          7,
      8,          15,         16,         17,         100,        127,
      128,        255,        256,        511,        512,        513,
      4095,       4096,       4097,       65536,      0x7fffffff, 0x80000000,
      0xfffffffe, 0xffffffff, 0xffffffff, 0x01000000,
  };
  switch (rnd(8)) {
  case 0:
    return was + 1;
  case 1:
    return was - 1;
  case 2:
    return was ^ UINT64_C(1) << rnd(8 * len);
  case 3:
    return rnd(x_nslots + 2);
  case 4:
    return x_pages[rnd(x_npages)];
  case 5:
    return len == 8 ? UINT64_C(1) << rnd(64) : x_nslots;
  case 6:
    if (len == 8) return UINT64_MAX >> rnd(3);
    break;
  default:
    break;
  }
  return some[rnd(COUNT_OF(some))];
}

/* Changes one of the fields at p. */
static void x_field(unsigned char *p, const struct field *fields, size_t n) {
  const struct field *field = fields + rnd((uint32_t)n);
  unsigned char *at = p + field->off;
  uint64_t was = field->len == 8 ? u_get64(at) : u_get32(at);
  uint64_t now = x_number(was, field->len);
  if (field->len == 8)
    u_put64(at, now);
  else
    u_put32(at, (uint32_t)now);
  m_note(" %s=%" PRIx64 ">%" PRIx64, field->name, was, now);
}

static void x_super(void) {
  uint32_t which = rnd(4); /* one of them, or both */
  uint64_t seed = m_seed;
  for (uint32_t i = 0; i < 2; i++) {
    unsigned char *p = f_now + i * CAS_UNIT;
    if (which == 1 - i) continue;
    m_note(" super%u", (unsigned)i);
    m_seed = seed;
    x_field(p, super_fields, COUNT_OF(super_fields));
    sha_256(0, p, NULL, X_SUPER_SUM, p + X_SUPER_SUM, NULL);
  }
}

/* Makes the sums of a page right, and those of its twin. */
static void x_seal(uint32_t slot, uint32_t copies) {
  unsigned char sum[32];
  for (uint32_t i = 0; i < 2; i++) {
    unsigned char *p = x_slot(slot + i * X_TWIN);
    if (!(copies >> i & 1)) continue;
    x_sum(p, sum);
    memcpy(p + X_PAGE_SUM, sum, 12);
    memcpy(x_digest(slot), sum, 32);
    memcpy(x_digest(slot + X_TWIN), sum, 32);
  }
}

/* Changes a page: its head, a slot that it names, or its record. */
static void x_page(void) {
  uint32_t slot = x_pages[rnd(x_npages)];
  uint32_t copies = rnd(4) ? 3 : 1 + rnd(2);
  unsigned char *p = x_slot(slot);
  int is_record = !memcmp(p, "CAT1", 4) && u_get32(p + X_PAGE_LEVEL) % 4 == 0;
  m_note(" page%u(%.4s,%u,%u)", (unsigned)slot, (const char *)p,
         (unsigned)u_get32(p + X_PAGE_LEVEL),
         (unsigned)u_get32(p + X_PAGE_INDEX));
  if (rnd(6) == 0) {
    x_field(p, page_fields, COUNT_OF(page_fields));
  } else if (is_record) {
    x_field(p + X_PAGE_BODY, record_fields, COUNT_OF(record_fields));
  } else {
    struct field entry = {"entry", X_PAGE_BODY, 4};
    for (int i = 0; i < 6; i++) { /* rather one that is there */
      entry.off = X_PAGE_BODY + 4 * rnd(8);
      if (u_get32(p + entry.off)) break;
    }
    m_note("[%u]", (unsigned)(entry.off - X_PAGE_BODY) / 4);
    x_field(p, &entry, 1);
  }
  if (copies == 3) memcpy(x_slot(slot + X_TWIN), p, X_BLOCK);
  if (copies == 2) { /* only the twin is changed */
    unsigned char was[X_BLOCK];
    memcpy(was, x_slot(slot + X_TWIN), X_BLOCK);
    memcpy(x_slot(slot + X_TWIN), p, X_BLOCK);
    memcpy(p, was, X_BLOCK);
  }
  if (rnd(8))
    x_seal(slot, copies);
  else
    m_note("(not sealed)");
}

/* Puts a page in the place of another one. */
static void x_swap(void) {
  uint32_t from = x_pages[rnd(x_npages)];
  uint32_t to = x_pages[rnd(x_npages)];
  m_note(" page%u=page%u", (unsigned)to, (unsigned)from);
  memcpy(x_slot(to), x_slot(from), X_BLOCK);
  memcpy(x_slot(to + X_TWIN), x_slot(from), X_BLOCK);
  x_seal(to, 3);
}

/* Makes the sum of a log page right: of its entries, with zeroes up to a
 * multiple of 64, its head, and the id of the store. */
static void x_seal_log(unsigned char *p) {
  unsigned char b[X_LOG_HEAD + 64 + 32 + 16] = {0};
  size_t len = (size_t)u_get32(p + X_LOG_COUNT) * X_ENTRY;
  if (len > X_LOG_HEAD) return; /* it has none */
  memcpy(b, p, len);
  len = (len + 63) / 64 * 64;
  memcpy(b + len, p + X_LOG_HEAD, 32);
  memcpy(b + len + 32, f_now + X_SUPER_ID, 16);
  sha_256(0, b, NULL, len + 48, p + X_LOG_SUM, NULL);
}

/* Changes a log page that has entries. */
static void x_log_page(void) {
  for (int i = 0; i < 40; i++) {
    uint32_t at = rnd(X_LOG_PAGES);
    unsigned char *p = f_now + X_LOG_BEGIN + at * X_LOG_PAGE;
    uint32_t count = u_get32(p + X_LOG_COUNT);
    if (memcmp(p + X_LOG_HEAD, "LOG1", 4) || !count) continue;
    /* rather one that will be replayed */
    if (u_get64(p + X_LOG_SEQ) < u_get64(f_now + X_SUPER_REPLAY) && i < 30)
      continue;
    m_note(" log%u", (unsigned)at);
    if (rnd(4) == 0)
      x_field(p, log_fields, COUNT_OF(log_fields));
    else
      x_field(p + rnd(count) % CAS_ENTRIES * X_ENTRY, entry_fields,
              COUNT_OF(entry_fields));
    x_seal_log(p);
    return;
  }
}

/* Overwrites something as a disk would, or cuts the file. */
static void x_rot(void) {
  uint32_t slot = rnd(x_nslots);
  uint64_t at = rnd((uint32_t)f_size / X_BLOCK) * (uint64_t)X_BLOCK;
  switch (rnd(4)) {
  case 0:
    m_note(" digest%u", (unsigned)slot);
    x_digest(slot)[rnd(32)] ^= 1;
    break;
  case 1:
    slot = x_pages[rnd(x_npages)];
    m_note(" rot page%u and twin", (unsigned)slot);
    x_slot(slot)[rnd(X_BLOCK)] ^= 1;
    x_slot(slot + X_TWIN)[rnd(X_BLOCK)] ^= 1;
    break;
  case 2:
    if (rnd(4)) return;
    m_note(" cut at %" PRIu64, at);
    memset(f_now + at, 0, (size_t)(f_size - at));
    f_size = at;
    break;
  default:
    m_note(" rot at %" PRIu64, at);
    for (uint32_t i = 0; i < X_BLOCK; i++)
      f_now[at + i] = (unsigned char)rnd(256);
  }
}

static void x_change(void) {
  switch (rnd(12)) {
  case 0:
  case 1:
    x_super();
    break;
  case 2:
  case 3:
  case 4:
    x_log_page();
    break;
  case 5:
    x_swap();
    break;
  case 6:
    x_rot();
    break;
  default:
    x_page();
  }
}

/* ---- What can be read ---------------------------------------------------- */

struct seen {
  char name[X_NAME];
  uint64_t size;
  uint64_t hash[X_MOST + 1]; /* of each block; 0: it cannot be read */
};
struct view {
  uint32_t n;
  uint32_t missed; /* there was no room for */
  struct seen volume[X_NVOLS];
};
static struct view views[4];

static int v_list(void *arg, const struct nbdserve_cas_info *info) {
  struct view *view = arg;
  SO(strlen(info->name) > 0 && strlen(info->name) < X_NAME);
  SO(info->size <= (uint64_t)X_MOST * X_BLOCK);
  if (view->n == X_NVOLS) {
    view->missed++;
    return 0;
  }
  struct seen *seen = view->volume + view->n++;
  strcpy(seen->name, info->name);
  seen->size = info->size;
  return 0;
}

static uint64_t v_hash(const unsigned char *p, size_t len) {
  uint64_t h = UINT64_C(0xcbf29ce484222325);
  for (size_t i = 0; i < len; i++)
    h = (h ^ p[i]) * UINT64_C(0x100000001b3);
  return h | 1;
}

/* Reads a volume, a leaf at a time and where that fails a block at a time. */
static void v_read(struct nbdserve_cas *cas, struct seen *seen) {
  struct nbdserve_export e = {0};
  unsigned char b[X_LEAF];
  int err = nbdserve_cas_volume(cas, seen->name, &e);
  memset(seen->hash, 0, sizeof seen->hash);
  if (err) return;
  for (uint64_t off = 0; off < e.size; off += X_LEAF) {
    uint64_t len = e.size - off < X_LEAF ? e.size - off : X_LEAF;
    int whole = e.ops->read(e.ctx, b, off, len, 0) == 0;
    for (uint64_t at = 0; at < len; at += X_BLOCK) {
      size_t n = len - at < X_BLOCK ? (size_t)(len - at) : X_BLOCK;
      if (whole || e.ops->read(e.ctx, b + at, off + at, n, 0) == 0)
        seen->hash[(off + at) / X_BLOCK] = v_hash(b + at, n);
    }
  }
  e.ops->close(e.ctx);
}

/* All that a store has. */
static void v_take(struct nbdserve_cas *cas, struct view *view) {
  view->n = view->missed = 0;
  SO(nbdserve_cas_list(cas, v_list, view) == 0);
  for (uint32_t i = 0; i < view->n; i++)
    v_read(cas, view->volume + i);
}

/* A volume is to change: comparing leaves it out. */
static void v_forget(struct view *view, const char *name) {
  for (uint32_t i = 0; i < view->n; i++)
    if (strcmp(view->volume[i].name, name) == 0) view->volume[i].name[0] = 0;
}

static struct seen *v_find(struct view *view, const char *name) {
  for (uint32_t i = 0; i < view->n; i++)
    if (strcmp(view->volume[i].name, name) == 0) return view->volume + i;
  return NULL;
}

/* What could be read in one view can be read in the other one, and is the
 * same. */
static void v_compare(struct view *before, struct view *after,
                      const char *when) {
  for (uint32_t i = 0; i < before->n; i++) {
    const struct seen *a = before->volume + i;
    if (v_find(before, a->name) != a) continue; /* twice the same name */
    if (!*a->name) continue;                    /* it was to change */
    const struct seen *b = v_find(after, a->name);
    if (!b) m_fail("%s %s is not there", when, a->name);
    if (a->size != b->size) m_fail("%s %s has another size", when, a->name);
    for (uint32_t k = 0; k < X_MOST; k++)
      if (a->hash[k] && a->hash[k] != b->hash[k])
        m_fail("%s block %u of %s %s", when, (unsigned)k, a->name,
               b->hash[k] ? "has changed" : "cannot be read");
  }
}

/* ---- A case -------------------------------------------------------------- */

static int m_damage(void *arg, const char *name, uint64_t off, uint64_t len,
                    const char *why) {
  (void)arg;
  SO(strlen(name) < X_NAME && strlen(why) > 0);
  SO(off <= (uint64_t)X_MOST * X_BLOCK && len <= (uint64_t)X_MOST * X_BLOCK);
  return 0;
}

static int m_range(void *arg, uint64_t off, uint64_t len) {
  uint64_t *end = arg;
  SO(off >= *end && len > 0 && off + len <= (uint64_t)X_MOST * X_BLOCK);
  *end = off + len;
  return 0;
}

/* Is that a reason not to open a store that was changed? */
static int m_is_refusal(int err) {
  return err == -EUCLEAN || err == -EINVAL || err == -EOPNOTSUPP;
}

static void m_check(struct nbdserve_cas *cas) {
#ifdef CAS_CHECK
  cas_check(cas);
#else
  (void)cas;
#endif
}

/* Looks at everything in an open store, without changing it. */
static void m_look(struct nbdserve_cas *cas, struct view *view) {
  struct nbdserve_cas_stat stat;
  m_check(cas);
  v_take(cas, view);
  nbdserve_cas_stat(cas, &stat);
  SO(stat.file == f_size && stat.stored <= f_size && stat.free <= f_size);
  for (uint32_t i = 1; i < view->n; i++) {
    uint64_t end = 0;
    (void)nbdserve_cas_diff(cas, view->volume[i - 1].name, view->volume[i].name,
                            m_range, &end);
  }
  int err = nbdserve_cas_verify(cas, m_damage, NULL, NULL);
  SO(err == 0 || err == -EUCLEAN);
  m_check(cas);
}

/* Changes something in a store that is open for writing: a volume is written,
 * another one gone or resized, and some are new.  Any of it may be refused. */
static void m_use(struct nbdserve_cas *cas, struct view *view) {
  struct nbdserve_export e = {0};
  unsigned char b[X_BLOCK];
  uint64_t bytes;
  char id[72];
  char changed[X_NAME];
  char other[X_NAME];
  char name[X_NAME + 8];
  if (!view->n) return;
  const struct seen *seen = view->volume + rnd(view->n);
  uint64_t size = seen->size;
  strcpy(changed, seen->name);
  strcpy(other, view->volume[rnd(view->n)].name);
  v_forget(view, changed);
  v_forget(view, other);
  for (int i = 0; i < 8 && size >= X_BLOCK; i++) {
    uint64_t off = rnd((uint32_t)(size / X_BLOCK)) * (uint64_t)X_BLOCK;
    uint32_t pattern = 1 + rnd(9999);
    if (c_write(cas, changed, off, X_BLOCK, pattern)) continue;
    SO(nbdserve_cas_volume(cas, changed, &e) == 0);
    SO(e.ops->read(e.ctx, b, off, X_BLOCK, 0) == 0 && u_get32(b) == pattern);
    if (rnd(3) == 0) (void)e.ops->trim(e.ctx, off, X_BLOCK, 0);
    if (rnd(9) == 0) (void)e.ops->zero(e.ctx, 0, size, 0);
    if (rnd(3) == 0) (void)e.ops->flush(e.ctx, 0);
    e.ops->close(e.ctx);
    m_check(cas);
  }
  if (nbdserve_cas_create(cas, "new", 20 * X_BLOCK) == 0)
    (void)c_write(cas, "new", 0, 20 * X_BLOCK, 1 + rnd(9999));
  snprintf(name, sizeof name, "%s@new", changed);
  if (nbdserve_cas_snapshot(cas, name) == 0 && rnd(2))
    (void)nbdserve_cas_seal(cas, name, id, NULL, NULL);
  m_check(cas);
  if (rnd(2)) (void)nbdserve_cas_clone(cas, changed, "copy");
  if (rnd(2))
    (void)nbdserve_cas_resize(cas, other, rnd(X_MOST * X_BLOCK));
  else
    (void)nbdserve_cas_rm(cas, other);
  m_check(cas);
  if (rnd(3) == 0) (void)nbdserve_cas_repair(cas, NULL, m_damage, NULL, NULL);
  if (rnd(3) == 0) (void)nbdserve_cas_gc(cas, &bytes, NULL, NULL);
  m_check(cas);
}

/* Closes a store: with all of its memory. */
enum {
  CK_LENIENT = 1, /* see cas_check */
  CK_FORGED = 2
};
static void cas_check(struct nbdserve_cas *st, int how);

static int ck_bytes(void *to, uint64_t off, size_t len) {
  if (off + len > F_MAX) return -1;
  memcpy(to, f_now + off, len);
  return 0;
}

static void ck_fail(const char *what, int line, uint32_t at) {
  m_fail("line %d: %s: of %" PRIu32, line, what, at);
}

static void m_close(struct nbdserve_cas *cas) {
  cas_check(cas, CK_FORGED);
  SO(nbdserve_cas_close(cas) == 0);
  SO(m_blocks == 0);
}

/* Uses a store that was opened for writing.  seen: what was read before. */
static void m_go_on(struct nbdserve_cas *cas, struct view *seen) {
  int err;
  if (rnd(4) == 0) cas->cache = 3 * cas->bs; /* so they are read back */
  m_look(cas, &views[1]);
  if (seen) v_compare(seen, &views[1], "for writing");
  m_use(cas, &views[1]);
  m_look(cas, &views[2]);
  v_compare(&views[1], &views[2], "after writing");
  m_close(cas);
  cas = c_open(NBDSERVE_CAS_READONLY, &err);
  if (!cas) m_fail("opened for writing, then refused for reading: %d", err);
  m_look(cas, &views[3]);
  v_compare(&views[2], &views[3], "later");
  m_close(cas);
  cas = c_open(0, &err);
  if (!cas) m_fail("opened for writing, then refused: %d", err);
  m_look(cas, &views[3]);
  v_compare(&views[2], &views[3], "once more");
  m_close(cas);
}

static void m_case(void) {
  static unsigned char was[F_MAX];
  uint64_t size;
  int err;
  x_take(&sound[rnd(X_NSTORES)]);
  for (uint32_t n = 1 + rnd(4); n > 0; n--)
    x_change();
  size = f_size;
  m_limit = (4 << 20) + 64 * f_size;
  memcpy(was, f_now, f_size);
  struct view *seen = NULL;
  struct nbdserve_cas *cas = c_open(NBDSERVE_CAS_READONLY, &err);
  if (!cas && !m_is_refusal(err)) m_fail("refused for reading: %d", err);
  if (cas) {
    seen = &views[0];
    m_look(cas, seen);
    m_close(cas);
  }
  SO(m_blocks == 0 && f_size == size && memcmp(was, f_now, f_size) == 0);
  cas = c_open(0, &err);
  if (!cas && !m_is_refusal(err)) m_fail("refused for writing: %d", err);
  if (cas) {
    m_go_on(cas, seen);
  } else {
    SO(m_blocks == 0);
    cas = c_open(NBDSERVE_CAS_ACCEPT_LOSS, &err);
    if (!cas && !m_is_refusal(err)) m_fail("refused for repair: %d", err);
    if (cas) m_go_on(cas, seen);
  }
  SO(m_blocks == 0);
  if (f_size > 2 * size + (1 << 20))
    m_fail("the file grew from %" PRIu64 " to %" PRIu64 " bytes", size, f_size);
}

/* Runs the cases from one on, until one ends the process. */
static void m_run(long from, long to, uint64_t seed) {
  c_make();
  for (long n = from; n < to; n++) {
    m_shared->current = n;
    m_shared->len = 0;
    m_shared->what[0] = 0;
    m_seed = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15) ^
             (uint64_t)(n + 1) * UINT64_C(0xbf58476d1ce4e5b9);
    for (int i = 0; i < 9; i++)
      (void)rnd(2);
    alarm(30);
    m_case();
    alarm(0);
  }
  _exit(0);
}

int main(int argc, char **argv) {
  long count = argc > 1 ? atol(argv[1]) : 1000;
  uint64_t seed = argc > 2 ? (uint64_t)atol(argv[2]) : 1;
  long from = argc > 3 ? atol(argv[3]) : 0;
  int failures = 0;
  int status = 0;
  m_shared = mmap(NULL, sizeof *m_shared, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (m_shared == MAP_FAILED) return 2;
  if (argc > 3) count = from + 1;
  while (from < count && failures < 25) {
    fflush(stdout);
    pid_t pid = fork();
    if (!pid) m_run(from, count, seed);
    if (pid < 0 || waitpid(pid, &status, 0) != pid) return 2;
    if (!status) break;
    printf("case %ld ended by %s %d:%s\nmutate 1 %" PRIu64 " %ld\n\n",
           m_shared->current, WIFSIGNALED(status) ? "signal" : "status",
           WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status),
           m_shared->what, seed, m_shared->current);
    failures++;
    from = m_shared->current + 1;
  }
  printf("%ld cases, %d failures\n", from < count ? count : from, failures);
  return failures > 0;
}

//== deny
/* Defends "a call that a sandbox forbids ends in a portable way": runs a
 * command under a seccomp filter that answers the calls which are there to be
 * fast or convenient with an error.  deny ERROR COMMAND ARG...; status 77: not
 * on this machine.
 *
 * The structures are the kernel's: not every libc has its headers. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct n_filter {
  uint16_t code;
  uint8_t yes, no; /* how many are skipped */
  uint32_t k;
};

struct n_program {
  unsigned short len;
  struct n_filter *filter;
};

enum {
  N_LOAD = 0x20,
  N_IF_EQUAL = 0x15,
  N_RETURN = 6,
  N_NUMBER = 0, /* where things are in what the filter sees */
  N_ARCH = 4
};

static const long n_denied[] = {
    SYS_accept4,
    SYS_fallocate,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_getrandom,
    SYS_fadvise64,
    SYS_copy_file_range,
    SYS_splice,
    SYS_memfd_create,
    SYS_pipe2,
#ifdef SYS_statx
    SYS_statx,
#endif
#ifdef SYS_landlock_create_ruleset
    SYS_landlock_create_ruleset,
#endif
    SYS_prctl, /* the last one, for this program needs it */
};

enum {
  N_DENIED = sizeof n_denied / sizeof *n_denied
};

int main(int argc, char **argv) {
#ifdef __x86_64__
  const uint32_t arch = 0xc000003e;
#elif defined __aarch64__
  const uint32_t arch = 0xc00000b7;
#else
  const uint32_t arch = 0;
#endif
  const uint32_t allow = 0x7fff0000, error = 0x50000;
  struct n_filter filter[2 * N_DENIED + 4], *f = filter;
  struct n_program program;
  int i, err;
  if (argc < 3 || !arch) return 77;
  err = strcmp(argv[1], "ENOSYS") ? EPERM : ENOSYS;
  *f++ = (struct n_filter){N_LOAD, 0, 0, N_ARCH};
  *f++ = (struct n_filter){N_IF_EQUAL, 0, 2 * N_DENIED + 1, arch};
  *f++ = (struct n_filter){N_LOAD, 0, 0, N_NUMBER};
  for (i = 0; i < N_DENIED; i++) {
    *f++ = (struct n_filter){N_IF_EQUAL, 0, 1, (uint32_t)n_denied[i]};
    *f++ = (struct n_filter){N_RETURN, 0, 0, error | (uint32_t)err};
  }
  *f++ = (struct n_filter){N_RETURN, 0, 0, allow};
  program.len = (unsigned short)(f - filter);
  program.filter = filter;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return 77;
  if (prctl(PR_SET_SECCOMP, 2, &program)) return 77;
  for (i = 0; i < N_DENIED; i++)
    if (syscall(n_denied[i], -1, 0, 0, 0, 0, 0) >= 0 || errno != err) {
      fprintf(stderr, "deny: call %ld is not denied\n", n_denied[i]);
      return 1;
    }
  execv(argv[2], argv + 2);
  return 126;
}

//== sandbox
/* Defends "once it listens it opens nothing more".  sandbox DIRECTORY; status
 * 77: this system cannot do that. */
#define main nbdserve_main
#include "nbdserve.c"
#undef main

static void x_must(int line, int is_so) {
  if (is_so) return;
  fprintf(stderr, "sandbox: line %d (errno %d)\n", line, errno);
  exit(1);
}
#define MUST(what) x_must(__LINE__, what)

/* What a thread that was started later must not be able to do, either */
static void *x_try(void *here) {
  struct sockaddr_in any = {.sin_family = AF_INET};
  static char *const argv[] = {NULL};
  int fd;
  MUST(chdir(here) == 0);
  MUST(open("there", O_RDONLY) < 0 && errno == EACCES);
  MUST(open("there", O_WRONLY) < 0 && errno == EACCES);
  MUST(open("new", O_WRONLY | O_CREAT, 0666) < 0 && errno == EACCES);
  MUST(mkdir("new", 0777) < 0 && errno == EACCES);
  MUST(symlink("there", "new") < 0 && errno == EACCES);
  MUST(execv("/bin/true", argv) < 0 && errno == EACCES);
  fd = socket(AF_INET, SOCK_STREAM, 0);
  MUST(bind(fd, (struct sockaddr *)&any, sizeof any) == 0 || errno == EACCES);
  close(fd);
  return NULL;
}

int main(int argc, char **argv) {
  char byte = 0;
  int fd, err;
  MUST(argc > 1 && chdir(argv[1]) == 0);
  fd = open("there", O_RDWR | O_CREAT, 0666);
  MUST(fd >= 0 && write(fd, "a", 1) == 1);
  err = os_sandbox();
  if (err == -ENOSYS || err == -EOPNOTSUPP) return 77;
  MUST(err == 0);
#if NBDSERVE_NO_THREADS
  x_try(argv[1]);
#else
  pthread_t thread;
  MUST(pthread_create(&thread, NULL, x_try, argv[1]) == 0);
  MUST(pthread_join(thread, NULL) == 0);
#endif
  MUST(pread(fd, &byte, 1, 0) == 1 && byte == 'a');
  MUST(pwrite(fd, "b", 1, 0) == 1 && fdatasync(fd) == 0);
  MUST(unlink("there") == 0);
  return 0;
}

//== connect
/* Defends "if nbdserve is killed ... a new server takes over", in the part
 * that needs no kernel's client: a server that is killed while it waits for its
 * own device lets go of all that it has.  connect DIRECTORY; a file in it
 * stands for the device. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <unistd.h>

/* fork(2), or a system that has no process to give */
static int c_forks = 1;
static pid_t c_fork(void) {
  if (c_forks) return fork();
  errno = EAGAIN;
  return -1;
}
#define fork c_fork
#define main nbdserve_main
#include "nbdserve.c"
#undef main

static volatile sig_atomic_t c_ended; /* told to; 1: when the data was safe */

static void c_must(int line, int is_so) {
  if (is_so) return;
  fprintf(stderr, "connect: line %d (errno %d)\n", line, errno);
  _exit(1);
}
#define MUST(what) c_must(__LINE__, what)

/* What the child does with the device: it dies, or waits until somebody opens
 * the gate.  Nothing but the device is open in it. */
static int c_die(int fd) {
  return raise(SIGKILL) + fd;
}
/* The server is told to end while the data is not safe yet. */
static int c_hurry(int fd) {
  kill(getppid(), SIGTERM);
  poll(NULL, 0, 200);
  return mkdir("safe", 0700) + fd;
}
static void c_ends(int sig) {
  (void)sig;
  c_ended = 1 + rmdir("safe");
}
static int c_wait(int fd) {
  if (fd != 0 || fcntl(1, F_GETFD) >= 0 || fcntl(2, F_GETFD) >= 0) return -1;
  MUST(mkdir("waits", 0700) == 0);
  MUST(open("gate", O_RDONLY) == 1);
  return rmdir("waits");
}

int main(int argc, char **argv) {
  char byte;
  int fd[2];
  struct stat st;
  MUST(argc > 1 && chdir(argv[1]) == 0);
  opt[OPT_CONNECT].text = "device";
  MUST(cli_use_device(0, close) == -ENOENT);
  int target = open("device", O_RDWR | O_CREAT, 0600);
  MUST(target >= 0 && mkfifo("gate", 0600) == 0 && pipe(fd) == 0);
  MUST(cli_use_device(0, close) == 0 && cli_use_device(0, fsync) == 0);
  MUST(cli_use_device(O_CREAT | O_EXCL, close) == -EEXIST);
  MUST(cli_use_device(0, c_die) == -(128 + SIGKILL));
  signal(SIGTERM, c_ends);
  MUST(cli_use_device(0, c_hurry) == 0 && c_ended == 1);
  c_forks = 0;
  MUST(cli_use_device(O_CREAT | O_EXCL, close) == -EEXIST);
  MUST(cli_use_device(0, close) == 0 && cli_use_device(0, fsync) == 0);
  c_forks = 1;
  pid_t pid = fork();
  MUST(pid >= 0);
  if (pid == 0) { /* the server: it has the lock, and writes to the pipe */
    MUST(os_lock_file(open("device", O_RDWR), 0) == 0);
    cli_use_device(0, c_wait);
    _exit(1);
  }
  close(fd[1]);
  while (stat("waits", &st) < 0)
    poll(NULL, 0, 10);
  MUST(os_lock_file(target, 0) == -EBUSY);
  kill(pid, SIGKILL);
  MUST(waitpid(pid, NULL, 0) == pid);
  MUST(os_lock_file(target, 0) == 0 && read(fd[0], &byte, 1) == 0);
  MUST(stat("waits", &st) == 0); /* the child still does */
  close(open("gate", O_WRONLY));
  while (stat("waits", &st) == 0)
    poll(NULL, 0, 10);
  return 0;
}

//== syncs
/* Defends what is true only while a sync runs, or between two: "power cut,
 * kill -9: what was flushed is there" with several threads.
 *
 * syncs FILE: fdatasync waits at a gate, a read or write at a bar.  What is
 * written is put down, and what was written before a sync began is on the
 * medium when that sync has returned.  After a cut a store is left that has the
 * medium and some of the rest. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* A small store: a few hundred slots, which soon are used again */
#define CAS_ENTRIES 84
#define CAS_UNIT 4096
#define CAS_FANOUT(bs) 8
#define CAS_SEGMENT 16
#define CAS_MAX_DIRTY 400
#define CAS_MARGIN 8
#define CAS_TRIES 12 /* 8 segments have their digests in one sector */
#define CAS_MIN_BLOCK 512
#define CAS_RESERVE_PAIRS 12

enum {
  SY_SIZE = 1 << 20,
  SY_OPS = 20000,
  SY_BLOCK = 512,
  SY_USED = 64,     /* blocks that are written first */
  SY_MORE = 200,    /* blocks that look for slots to use again */
  SY_WIDE = 640,    /* blocks below many leaves */
  SY_BLOCKS = 1000, /* of the volume */
  SY_LOG = 64,      /* pages */
  SY_DATA = 2 * CAS_UNIT + SY_LOG * 4096
};
/* Which writes a cut leaves that are not on the medium as yet */
enum {
  SY_NONE = 0,
  SY_META = 1,  /* log and superblocks */
  SY_SLOTS = 2, /* data, pages, and their digests */
  SY_ROTTEN = 4 /* and the first superblock has rotted: not in format 1 */
};

static pthread_mutex_t sy_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sy_woken = PTHREAD_COND_INITIALIZER;
static int sy_fd = -1;           /* of the store */
static int sy_gate = 1 << 30;    /* so many syncs may pass */
static int sy_began, sy_ended;   /* syncs */
static int sy_on_medium, sy_ops; /* writes on the medium; all of them */
static struct {
  off_t off;
  size_t len;
  unsigned char *data;
} sy_op[SY_OPS];
static unsigned char sy_medium[SY_SIZE], sy_image[SY_SIZE];
static off_t sy_limit = SY_SIZE;
static unsigned char sy_hole[SY_SIZE / SY_BLOCK]; /* that was punched there */
/* The first call that reads, or writes, in a part of the file waits at the bar
 * until there is another one, or none; later calls pass. */
static struct {
  int writes;     /* it is for writes */
  off_t from, to; /* that part; then that of the call; 0: there is no bar */
  int held;       /* a call waits */
  int turn;       /* counts bars */
} sy_bar;
static off_t sy_full, sy_full_end; /* where writes find no space */
static const char *sy_doing = "start";

static void sy_fail(const char *what, long n) {
  printf("%s: %s (%ld)\n", sy_doing, what, n);
  exit(1);
}

static void sy_put(int fd, const void *p, size_t len, off_t off) {
  pthread_mutex_lock(&sy_lock);
  if (fd == sy_fd) {
    if (sy_ops == SY_OPS || off + (off_t)len > SY_SIZE)
      sy_fail("too much is written", off);
    sy_op[sy_ops].off = off;
    sy_op[sy_ops].len = len;
    sy_op[sy_ops].data = malloc(len);
    memcpy(sy_op[sy_ops++].data, p, len);
  }
  pthread_mutex_unlock(&sy_lock);
}

/* Waits at the bar if it is for that call.  0, or -1: there is no space. */
static int sy_pass(int fd, int writes, const struct iovec *v, int n,
                   off_t off) {
  off_t end = off;
  int turn, full;
  while (n-- > 0)
    end += (off_t)v++->iov_len;
  pthread_mutex_lock(&sy_lock);
  turn = sy_bar.turn;
  if (fd == sy_fd && writes == sy_bar.writes && !sy_bar.held &&
      off < sy_bar.to && end > sy_bar.from) {
    sy_bar.held = 1;
    sy_bar.from = off;
    sy_bar.to = end;
    pthread_cond_broadcast(&sy_woken);
    while (turn == sy_bar.turn)
      pthread_cond_wait(&sy_woken, &sy_lock);
  }
  full = fd == sy_fd && writes && off < sy_full_end && end > sy_full;
  pthread_mutex_unlock(&sy_lock);
  return full ? errno = ENOSPC, -1 : 0;
}

static ssize_t sy_preadv(int fd, const struct iovec *v, int n, off_t off) {
  sy_pass(fd, 0, v, n, off);
  return preadv(fd, v, n, off);
}

static ssize_t sy_pread(int fd, void *p, size_t len, off_t off) {
  struct iovec v = {p, len};
  return sy_preadv(fd, &v, 1, off);
}

static ssize_t sy_pwritev(int fd, const struct iovec *v, int n, off_t off) {
  off_t at = off;
  int i;
  if (sy_pass(fd, 1, v, n, off)) return -1;
  for (i = 0; i < n; at += (off_t)v[i++].iov_len)
    sy_put(fd, v[i].iov_base, v[i].iov_len, at);
  return pwritev(fd, v, n, off);
}

static ssize_t sy_pwrite(int fd, void *p, size_t len, off_t off) {
  struct iovec v = {p, len};
  return sy_pwritev(fd, &v, 1, off);
}

static int sy_fallocate(int fd, int mode, off_t off, off_t len) {
  if (fd == sy_fd && off + len > sy_limit) return errno = ENOSPC, -1;
  if (fd == sy_fd)
    memset(sy_hole + off / SY_BLOCK, mode != 0, (size_t)len / SY_BLOCK);
  if (!fallocate(fd, mode, off, len)) return 0;
  return fd == sy_fd && mode ? 0 : -1; /* it may keep the space */
}

static int sy_fdatasync(int fd) {
  int mine, mark, i;
  if (fd != sy_fd) return 0;
  pthread_mutex_lock(&sy_lock);
  mine = sy_began++;
  mark = sy_ops;
  pthread_cond_broadcast(&sy_woken);
  while (mine >= sy_gate)
    pthread_cond_wait(&sy_woken, &sy_lock);
  for (i = sy_on_medium; i < mark; i++)
    memcpy(sy_medium + sy_op[i].off, sy_op[i].data, sy_op[i].len);
  if (mark > sy_on_medium) sy_on_medium = mark;
  sy_ended++;
  pthread_cond_broadcast(&sy_woken);
  pthread_mutex_unlock(&sy_lock);
  return 0;
}

#define pread sy_pread
#define preadv sy_preadv
#define pwrite sy_pwrite
#define pwritev sy_pwritev
#define fallocate sy_fallocate
#define fdatasync sy_fdatasync
#define NBDSERVE_NO_MAIN 1
#include "nbdserve.c"
#undef pread
#undef preadv
#undef pwrite
#undef pwritev
#undef fallocate
#undef fdatasync

static struct nbdserve_cas *sy_cas;
static struct nbdserve_export sy_export;
static char sy_path[4096], sy_copy[4096];
static uint32_t sy_content[SY_BLOCKS]; /* what a block must be, or... */
static uint32_t sy_before[SY_BLOCKS];  /* ...may be, if that was not flushed */
static uint32_t sy_last;               /* contents that no block had before */

static void sy_fill(unsigned char b[SY_BLOCK], uint32_t content) {
  int i;
  for (i = 0; i < SY_BLOCK; i++)
    b[i] = (unsigned char)(i < 4 || !content ? content >> i % 4 * 8 : 7u);
}

static int sy_write(uint32_t block) {
  unsigned char b[SY_BLOCK];
  sy_fill(b, ++sy_last);
  int err = sy_export.ops->write(sy_export.ctx, b, (uint64_t)block * SY_BLOCK,
                                 SY_BLOCK, 0);
  pthread_mutex_lock(&sy_lock);
  if (!err) sy_content[block] = sy_last;
  pthread_mutex_unlock(&sy_lock);
  return err;
}

/* Reads a block, which has to be what it must be. */
static int sy_read(uint32_t block) {
  unsigned char b[SY_BLOCK], want[SY_BLOCK];
  int err = sy_export.ops->read(sy_export.ctx, b, (uint64_t)block * SY_BLOCK,
                                SY_BLOCK, 0);
  pthread_mutex_lock(&sy_lock);
  sy_fill(want, sy_content[block]);
  pthread_mutex_unlock(&sy_lock);
  return !err && memcmp(b, want, SY_BLOCK) ? -EBADMSG : err;
}

/* All that was written has been flushed. */
static void sy_flushed(void) {
  memcpy(sy_before, sy_content, sizeof sy_before);
}

#ifdef NBDSERVE_CAS_REPAIR
static int sy_damaged(void *arg, const char *name, uint64_t off, uint64_t len,
                      const char *why) {
  (void)arg, (void)name, (void)len;
  sy_fail(why, (long)off);
  return 0;
}
#else
static void sy_damaged(void *arg, const char *name, uint64_t off, uint64_t len,
                       const char *why) {
  (void)arg, (void)name, (void)len;
  sy_fail(why, (long)off);
}
#endif

/* Opens what a cut leaves: what must be there is, and nothing is damaged. */
static void sy_cut(int kept) {
  struct nbdserve_cas_options o = {.flags = NBDSERVE_CAS_VERIFY};
  struct nbdserve_export e = {0};
  struct nbdserve_cas *copy;
  unsigned char b[SY_BLOCK], want[SY_BLOCK];
  int i, fd, err;
  pthread_mutex_lock(&sy_lock);
  memcpy(sy_image, sy_medium, SY_SIZE);
  for (i = sy_on_medium; i < sy_ops; i++)
    if (kept & (sy_op[i].off < SY_DATA ? SY_META : SY_SLOTS))
      memcpy(sy_image + sy_op[i].off, sy_op[i].data, sy_op[i].len);
  if (kept & SY_ROTTEN) sy_image[100] ^= 1;
  pthread_mutex_unlock(&sy_lock);
  fd = open(sy_copy, O_RDWR | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || pwrite(fd, sy_image, SY_SIZE, 0) != SY_SIZE) exit(2);
  close(fd);
  err = nbdserve_cas_open(sy_copy, &o, &copy);
  if (err) sy_fail("it does not open after a cut", err);
  err = nbdserve_cas_volume(copy, "v", &e);
  if (err) sy_fail("the volume is not there after a cut", err);
  for (i = 0; i < SY_BLOCKS; i++) {
    err = e.ops->read(e.ctx, b, (uint64_t)i * SY_BLOCK, SY_BLOCK, 0);
    sy_fill(want, sy_content[i]);
    if (!err && memcmp(b, want, SY_BLOCK)) sy_fill(want, sy_before[i]);
    if (err || memcmp(b, want, SY_BLOCK)) sy_fail("lost after a cut: block", i);
  }
  err = nbdserve_cas_verify(copy, sy_damaged, NULL, NULL);
  if (err) sy_fail("verify", err);
  e.ops->close(e.ctx);
  if (nbdserve_cas_close(copy)) sy_fail("close", 0);
}

/* ---- What threads do ---------------------------------------------------- */

struct sy_thread {
  pthread_t id;
  int (*run)(uint32_t); /* what it does, */
  uint32_t arg;         /* with that, */
  int err;              /* and how that ended */
  int ended;            /* under sy_lock */
};

static int sy_flush(uint32_t unused) {
  (void)unused;
  return sy_export.ops->flush(sy_export.ctx, 0);
}

static int sy_snapshot(uint32_t number) {
  char name[32];
  snprintf(name, sizeof name, "v@%u", number);
  return nbdserve_cas_snapshot(sy_cas, name);
}

static int sy_checkpoint(uint32_t unused) {
  (void)unused;
  return cas_checkpoint(sy_cas, NULL, UINT64_MAX);
}

static void *sy_run(void *arg) {
  struct sy_thread *t = arg;
  int err = t->run(t->arg);
  pthread_mutex_lock(&sy_lock);
  t->err = err;
  t->ended = 1;
  pthread_cond_broadcast(&sy_woken);
  pthread_mutex_unlock(&sy_lock);
  return NULL;
}

static void sy_start(struct sy_thread *t) {
  t->ended = 0;
  if (pthread_create(&t->id, NULL, sy_run, t)) exit(2);
}

/* So many syncs more than now may pass. */
static void sy_open(int n) {
  pthread_mutex_lock(&sy_lock);
  sy_gate = n < 0 ? 1 << 30 : sy_ended + n;
  pthread_cond_broadcast(&sy_woken);
  pthread_mutex_unlock(&sy_lock);
}

/* Waits until a sync is held at the gate, or the thread has ended: 0. */
static int sy_held(struct sy_thread *t) {
  int held;
  pthread_mutex_lock(&sy_lock);
  while (!(sy_began > sy_gate) && !t->ended)
    pthread_cond_wait(&sy_woken, &sy_lock);
  held = !t->ended;
  pthread_mutex_unlock(&sy_lock);
  return held;
}

/* Waits for a thread to end, but not for longer than that.  Has it? */
static int sy_has_ended(struct sy_thread *t, int ms) {
  struct timespec until;
  int ended, late = 0;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += ms / 1000;
  until.tv_nsec += ms % 1000 * 1000000;
  until.tv_sec += until.tv_nsec / 1000000000;
  until.tv_nsec %= 1000000000;
  pthread_mutex_lock(&sy_lock);
  while (!t->ended && !late)
    late = pthread_cond_timedwait(&sy_woken, &sy_lock, &until);
  ended = t->ended;
  pthread_mutex_unlock(&sy_lock);
  return ended;
}

static int sy_join(struct sy_thread *t) {
  if (!sy_has_ended(t, 20000)) sy_fail("a thread does not end", 0);
  pthread_join(t->id, NULL);
  return t->err;
}

static void sy_ok(const char *what, int err) {
  if (err) sy_fail(what, err);
}

/* Sets a bar for reads or writes; who waits at the last one goes on. */
static void sy_set_bar(int writes, uint64_t from, uint64_t len) {
  pthread_mutex_lock(&sy_lock);
  sy_bar.writes = writes;
  sy_bar.from = (off_t)from;
  sy_bar.to = (off_t)(from + len);
  sy_bar.held = 0;
  sy_bar.turn++;
  pthread_cond_broadcast(&sy_woken);
  pthread_mutex_unlock(&sy_lock);
}

static void sy_no_bar(void) {
  sy_set_bar(0, 0, 0);
}

/* Waits until a call of the thread is held at the bar. */
static void sy_at_bar(struct sy_thread *t) {
  pthread_mutex_lock(&sy_lock);
  while (!sy_bar.held && !t->ended)
    pthread_cond_wait(&sy_woken, &sy_lock);
  if (t->ended) sy_fail("it does not read or write there", t->err);
  pthread_mutex_unlock(&sy_lock);
}

/* From now on there is no space where the call at the bar writes. */
static void sy_no_space(void) {
  pthread_mutex_lock(&sy_lock);
  sy_full = sy_bar.from;
  sy_full_end = sy_bar.to;
  pthread_mutex_unlock(&sy_lock);
}

/* Writes so many blocks from there on, as long as no other sync begins. */
static void sy_writes(uint32_t from, int n) {
  int began = sy_began;
  for (; n > 0 && sy_began == began; n--)
    if (sy_write(from++)) return; /* no space is no news */
}

/* Writes blocks below many leaves: more than one portion of a checkpoint. */
static void sy_wide(void) {
  uint32_t block;
  for (block = 0; block < SY_WIDE; block += 4)
    sy_ok("write", sy_write(block));
}

/* Takes out of memory all leaves that may go. */
static void sy_evict(void) {
  uint64_t cache = sy_cas->cache;
  int i;
  os_lock(&sy_cas->lock);
  sy_cas->cache = 0;
  for (i = 0; i < 8; i++) /* first they count as used */
    cas_evict_leaf(sy_cas);
  sy_cas->cache = cache;
  cas_unlock(sy_cas);
}

/* Makes all leaves clean and takes them out of memory; where is that page? */
static uint64_t sy_leaf(uint32_t block) {
  const struct cas_volume *vol = sy_export.ctx;
  const struct cas_node *leaf;
  struct cas_spot spot;
  uint64_t off;
  sy_ok("checkpoint", sy_checkpoint(0));
  sy_evict();
  os_lock(&sy_cas->lock);
  leaf = cas_walk(sy_cas, *cas_root(vol), block, &spot);
  if (!leaf) sy_fail("the leaf is in memory: of block", block);
  off = cas_data_off(sy_cas, leaf->slot);
  cas_unlock(sy_cas);
  return off;
}

/* Everything is what it must be, also if it is read back. */
static void sy_check(void) {
  uint32_t block;
  sy_evict();
  for (block = 0; block < SY_BLOCKS; block++)
    if (sy_read(block)) sy_fail("not what was written: block", block);
}

/* ---- The tests ---------------------------------------------------------- */

/* A new store with a few flushed blocks, which cannot grow */
static void sy_new(const char *doing) {
  struct nbdserve_cas_options o = {.block_size = SY_BLOCK, .log_pages = SY_LOG};
  int i, fd;
  sy_doing = doing;
  sy_gate = 1 << 30;
  sy_fd = -1;
  sy_limit = SY_SIZE;
  unlink(sy_path);
  memset(sy_content, 0, sizeof sy_content);
  if (nbdserve_cas_init(sy_path, &o)) sy_fail("init", 0);
  if (nbdserve_cas_open(sy_path, NULL, &sy_cas)) sy_fail("open", 0);
  if (nbdserve_cas_create(sy_cas, "v", SY_BLOCKS * SY_BLOCK) ||
      nbdserve_cas_volume(sy_cas, "v", &sy_export))
    sy_fail("create", 0);
  for (i = 0; i < SY_USED; i++)
    if (sy_write((uint32_t)i)) sy_fail("write", i);
  if (nbdserve_cas_snapshot(sy_cas, "v@0")) sy_fail("snapshot", 0);
  sy_writes(SY_USED, 300); /* make room in the file, and free it again */
  if (sy_export.ops->trim(sy_export.ctx, SY_USED * SY_BLOCK, 300 * SY_BLOCK, 0))
    sy_fail("trim", 0);
  memset(sy_content + SY_USED, 0, 300 * sizeof *sy_content);
  if (nbdserve_cas_rm(sy_cas, "v@0")) sy_fail("rm", 0);
  sy_flushed();
  fd = open(sy_path, O_RDONLY);
  memset(sy_medium, 0, SY_SIZE);
  if (fd < 0 || pread(fd, sy_medium, SY_SIZE, 0) < 0) exit(2);
  close(fd);
  memset(sy_hole, 0, sizeof sy_hole);
  sy_cas->can_read_now = 0; /* all that is read passes the bar */
  for (i = 0; i < sy_ops; i++)
    free(sy_op[i].data);
  sy_ops = sy_on_medium = sy_began = sy_ended = 0;
  sy_limit = 0;
  pthread_mutex_lock(&sy_lock); /* the index may still be filled */
  sy_full = sy_full_end = 0;
  sy_fd = sy_cas->fd;
  pthread_mutex_unlock(&sy_lock);
}

static void sy_end(void) {
  sy_open(-1);
  sy_export.ops->close(sy_export.ctx);
  memset(&sy_export, 0, sizeof sy_export);
  if (nbdserve_cas_close(sy_cas)) sy_fail("close", 0);
}

/* Cuts the power in all ways. */
static void sy_cuts(void) {
  int kept, n = SY_ROTTEN;
#ifdef NBDSERVE_CAS_REPAIR
  n *= 2;
#endif
  for (kept = 0; kept < n; kept++)
    sy_cut(kept);
}

/* What log pages say that are written during a sync, or behind it: not that it
 * has ended, or has covered those.  What it has not may be missing. */
static void sy_durable(void) {
  struct sy_thread a = {.run = sy_flush};
  sy_new("log pages that are written during a sync");
  sy_write(700);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  sy_writes(SY_USED, 2 * CAS_ENTRIES);
  sy_cuts();
  sy_open(1);
  sy_join(&a);
  sy_writes(SY_USED + 2 * CAS_ENTRIES, CAS_ENTRIES + 1);
  sy_cuts();
  sy_end();
}

/* What is written during a sync is not flushed by it: another one follows. */
static void sy_counted(void) {
  struct sy_thread a = {.run = sy_flush}, b = {.run = sy_flush};
  sy_new("a flush of what was written during a sync");
  sy_write(700);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  sy_write(1);
  sy_open(1);
  sy_join(&a);
  sy_open(-1);
  sy_start(&b);
  sy_join(&b);
  sy_flushed();
  sy_cut(SY_NONE);
  sy_end();
}

/* Slots that are dropped during a sync are not free when it ends. */
static void sy_dropped(void) {
  struct sy_thread a = {.run = sy_flush};
  sy_new("slots that are dropped during a sync");
  sy_write(700);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  sy_writes(0, SY_USED);
  sy_open(1);
  sy_join(&a);
  sy_writes(SY_USED, SY_MORE);
  sy_cuts();
  sy_end();
}

/* What only the older superblock names is not free before the newer one is
 * durable; cut in each sync of a checkpoint. */
static void sy_superblock(void) {
  struct sy_thread a = {.run = sy_snapshot, .arg = 100};
  int k, held = 1;
  for (k = 0; held; k++) {
    sy_new("slots that the older superblock names");
    sy_writes(0, SY_USED);
    if (sy_export.ops->flush(sy_export.ctx, 0)) sy_fail("flush", 0);
    sy_flushed();
    sy_open(k);
    sy_start(&a);
    held = sy_held(&a);
    sy_writes(SY_USED, SY_MORE);
    sy_cuts();
    sy_open(-1);
    sy_ok("thread", sy_join(&a));
    sy_end();
  }
  if (k < 3) sy_fail("there were not enough syncs", k);
}

/* A flush waits for a sync that began after it was called; one for all. */
static void sy_joined(void) {
  struct sy_thread a = {.run = sy_flush}, b[2];
  int i;
  b[0] = b[1] = a;
  sy_new("flushes while a sync runs");
  sy_write(700);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  for (i = 0; i < 2; i++) {
    sy_write((uint32_t)i);
    sy_start(b + i);
  }
  usleep(50000); /* if they do not wait, they have time to end */
  if (b[0].ended || b[1].ended) sy_fail("one ended before any sync had", 0);
  sy_open(1);
  sy_join(&a);
  usleep(50000);
  pthread_mutex_lock(&sy_lock);
  if (b[0].ended || b[1].ended) sy_fail("one was joined to an older sync", 0);
  pthread_mutex_unlock(&sy_lock);
  sy_open(-1);
  for (i = 0; i < 2; i++)
    sy_ok("thread", sy_join(b + i));
  if (sy_ended != 2) sy_fail("not one sync for both", sy_ended);
  sy_flushed();
  sy_cut(SY_NONE);
  sy_end();
}

/* A leaf that is read has changed, and left memory, when it comes: what came is
 * not what it is.  Its pair is not taken for others meanwhile. */
static void sy_reread(void) {
  struct sy_thread a = {.run = sy_read, .arg = 1};
  int i;
  sy_new("a leaf that changes while it is read");
  sy_limit = SY_SIZE;
  sy_set_bar(0, sy_leaf(1), SY_BLOCK);
  sy_start(&a);
  sy_at_bar(&a);
  sy_ok("write", sy_write(1));
  for (i = 0; i < 6; i++) { /* until its place comes round again */
    sy_ok("checkpoint", sy_checkpoint(0));
    sy_wide();
  }
  sy_ok("checkpoint", sy_checkpoint(0));
  sy_evict();
  sy_no_bar();
  sy_ok("read", sy_join(&a));
  sy_check();
  sy_end();
}

/* Who has read a leaf drops its pair last: that is free after a checkpoint, not
 * after a sync. */
static void sy_retired(void) {
  struct sy_thread a = {.run = sy_read, .arg = 1}, b = {.run = sy_checkpoint};
  sy_new("a leaf that is retired while it is read");
  sy_limit = SY_SIZE;
  sy_wide();
  sy_set_bar(0, sy_leaf(1), SY_BLOCK);
  sy_start(&a);
  sy_at_bar(&a);
  sy_ok("write", sy_write(1));
  sy_no_bar();
  sy_ok("read", sy_join(&a));
  sy_ok("flush", sy_flush(0));
  sy_flushed();
  sy_wide();
  sy_set_bar(1, 0, CAS_PAGE); /* it has written its pages by then */
  sy_start(&b);
  sy_at_bar(&b);
  sy_cut(SY_NONE);
  sy_no_bar();
  sy_ok("checkpoint", sy_join(&b));
  sy_end();
}

/* A leaf changes, and others would leave memory, while a checkpoint writes its
 * first pages; and these may find no space. */
static void sy_portions(int is_full) {
  struct sy_thread a = {.run = sy_checkpoint};
  sy_new("changes while pages are written");
  sy_limit = SY_SIZE;
  sy_wide();
  sy_ok("flush", sy_flush(0));
  sy_flushed();
  sy_set_bar(1, SY_DATA, SY_SIZE - SY_DATA);
  sy_start(&a);
  sy_at_bar(&a);
  sy_ok("write", sy_write(1));
  sy_ok("write", sy_write(SY_WIDE - 3));
  sy_evict();
  if (is_full) sy_no_space();
  sy_no_bar();
  sy_ok("checkpoint", sy_join(&a));
  sy_cut(SY_NONE);
  sy_cut(SY_META | SY_SLOTS);
  sy_check();
  sy_ok("checkpoint", sy_checkpoint(0));
  os_lock(&sy_cas->lock);
  if (sy_cas->ndirty) sy_fail("dirty behind a checkpoint", sy_cas->ndirty);
  cas_unlock(sy_cas);
  sy_flushed();
  sy_cut(SY_NONE);
  sy_end();
}

/* What a log page drops is free when that is durable, not when its sync
 * begins. */
static void sy_overwritten(void) {
  struct sy_thread a = {.run = sy_flush};
  sy_new("slots that were dropped before a sync, while it runs");
  sy_writes(0, SY_USED);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  sy_writes(SY_USED, SY_MORE);
  sy_cuts();
  sy_open(-1);
  sy_ok("flush", sy_join(&a));
  sy_end();
}

/* Writes two blocks at once, the second one all zeroes. */
static int sy_write_two(uint32_t block) {
  unsigned char b[2 * SY_BLOCK] = {0};
  sy_fill(b, sy_content[2]);
  return sy_export.ops->write(sy_export.ctx, b, (uint64_t)block * SY_BLOCK,
                              sizeof b, 0);
}

/* Who waits for a sync, to get room for the second block of a write, has the
 * entry of the first one in the file (C3). */
static void sy_logged(void) {
  struct sy_thread a = {.run = sy_write_two, .arg = SY_USED - 1};
  struct sy_thread b = {.run = sy_flush};
  uint32_t before, now;
  sy_new("the log while a writer waits");
  sy_ok("write", sy_write(1));
  os_lock(&sy_cas->lock); /* leave pages for what has a leaf, not for others */
  while (sy_cas->npairs >= sy_cas->ndirty + CAS_RESERVE_PAIRS + CAS_MARGIN)
    cas_take_pair(sy_cas);
  cas_unlock(sy_cas);
  sy_open(0);
  sy_start(&b);
  sy_held(&b);
  now = before = sy_cas->nlog;
  sy_start(&a);
  while (now == before) {
    os_lock(&sy_cas->lock);
    now = sy_cas->nlog;
    os_unlock(&sy_cas->lock); /* which does not write the log */
  }
  sy_content[SY_USED - 1] = sy_before[SY_USED - 1] = sy_content[2];
  sy_cut(SY_META | SY_SLOTS);
  sy_open(-1);
  sy_ok("flush", sy_join(&b));
  sy_ok("write", sy_join(&a));
  sy_check();
  sy_end();
}

/* Writes a quarter of block 1. */
static int sy_write_part(uint32_t quarter) {
  unsigned char b[SY_BLOCK / 4];
  memset(b, 'a' + (int)quarter, sizeof b);
  return sy_export.ops->write(
      sy_export.ctx, b, SY_BLOCK + (uint64_t)quarter * sizeof b, sizeof b, 0);
}

/* Parts of one block are written at a time: who has read it finds that it is
 * another one by now, and begins anew.  Of a hole there is nothing to read, so
 * the first one is held when it writes. */
static void sy_parts(int of_a_hole) {
  struct sy_thread a = {.run = sy_write_part, .arg = 0};
  struct sy_thread b = {.run = sy_write_part, .arg = 1};
  unsigned char is[SY_BLOCK];
  struct cas_spot spot;
  sy_new("parts of one block that are written at a time");
  sy_limit = SY_SIZE;
  if (of_a_hole)
    sy_ok("trim", sy_export.ops->trim(sy_export.ctx, SY_BLOCK, SY_BLOCK, 0));
  os_lock(&sy_cas->lock);
  sy_ok("find", cas_find_spot(sy_cas, cas_root(sy_export.ctx), 1, &spot));
  cas_unlock(sy_cas);
  if (!spot.slot != of_a_hole) sy_fail("slot", spot.slot);
  if (of_a_hole)
    sy_set_bar(1, SY_DATA, SY_SIZE - SY_DATA);
  else
    sy_set_bar(0, cas_data_off(sy_cas, spot.slot), SY_BLOCK);
  sy_start(&a);
  sy_at_bar(&a);
  sy_start(&b);
  sy_ok("write", sy_join(&b));
  sy_no_bar();
  sy_ok("write", sy_join(&a));
  sy_ok("read", sy_export.ops->read(sy_export.ctx, is, SY_BLOCK, SY_BLOCK, 0));
  if (is[0] != 'a' || is[SY_BLOCK / 4] != 'b') sy_fail("one is lost", is[0]);
  sy_ok("write", sy_write(1));
  sy_end();
}

/* ---- Changes of the catalog, checks and gc beside others ---- */

static int sy_stops; /* under sy_lock: verify ends at the next step */

static int sy_change(uint32_t verb) {
  const char *name = verb == NBDSERVE_CAS_ROLLBACK ? "w@1" : "w";
  if (verb == NBDSERVE_CAS_CREATE) name = "x";
  return nbdserve_cas_change(sy_cas, (int)verb, name, "x", SY_BLOCK);
}

static int sy_look_up(uint32_t name) {
  const char text[2] = {(char)name, 0};
  struct nbdserve_export e = {0};
  int err = nbdserve_cas_volume(sy_cas, text, &e);
  if (!err) e.ops->close(e.ctx);
  return err;
}

static int sy_note(void *arg, const struct nbdserve_cas_info *info) {
  size_t n = strlen(arg);
  snprintf((char *)arg + n, 200 - n, "%s %d %d ", info->name, (int)info->size,
           (int)info->clients);
  return 0;
}

/* What there is, as a text */
static void sy_list(char text[200]) {
  *text = 0;
  sy_ok("list", nbdserve_cas_list(sy_cas, sy_note, text));
}

/* Makes a volume with a block that no other has, and returns where that is. */
static uint64_t sy_add(const char *name) {
  struct nbdserve_export e = {0};
  struct cas_spot spot;
  unsigned char b[SY_BLOCK];
  uint64_t off;
  sy_fill(b, ++sy_last);
  sy_ok("create", nbdserve_cas_create(sy_cas, name, SY_BLOCK));
  sy_ok("volume", nbdserve_cas_volume(sy_cas, name, &e));
  sy_ok("write", e.ops->write(e.ctx, b, 0, SY_BLOCK, 0));
  os_lock(&sy_cas->lock);
  sy_ok("find", cas_find_spot(sy_cas, cas_root(e.ctx), 0, &spot));
  off = cas_data_off(sy_cas, spot.slot);
  cas_unlock(sy_cas);
  e.ops->close(e.ctx);
  return off;
}

/* Before a change is durable everybody sees what was before.  Who wants a
 * volume that it changes waits until it is. */
static void sy_staged(uint32_t verb) {
  struct sy_thread a = {.run = sy_change, .arg = verb};
  struct sy_thread w = {.run = sy_look_up, .arg = 'w'};
  struct sy_thread x = {.run = sy_look_up, .arg = 'x'};
  int is_gone = verb == NBDSERVE_CAS_RENAME || verb == NBDSERVE_CAS_RM;
  int is_new = verb == NBDSERVE_CAS_CREATE; /* and w stays as it is */
  char was[200], is[200];
  sy_new("a change that is not durable");
  sy_add("w");
  sy_ok("snapshot", nbdserve_cas_snapshot(sy_cas, "w@1"));
  sy_ok("resize", nbdserve_cas_resize(sy_cas, "w", 2 * SY_BLOCK));
  if (is_gone) sy_ok("rm", nbdserve_cas_rm(sy_cas, "w@1"));
  sy_list(was);
  sy_open(0);
  sy_start(&a);
  sy_held(&a);
  sy_list(is);
  if (strcmp(was, is)) sy_fail(is, (long)verb);
  sy_start(&x);
  if (sy_join(&x) != -ENOENT) sy_fail("its new name is seen", (long)verb);
  sy_start(&w);
  if (sy_has_ended(&w, is_new ? 20000 : 50) != is_new)
    sy_fail("it is not waited for, or another one is", (long)verb);
  sy_open(-1);
  sy_ok("change", sy_join(&a));
  if (sy_join(&w) != (is_gone ? -ENOENT : 0)) sy_fail("volume", (long)verb);
  sy_list(is);
  if (!strcmp(was, is)) sy_fail(is, (long)verb);
  sy_end();
}

static int sy_progress(void *arg, uint64_t done, uint64_t total) {
  int stops;
  (void)arg, (void)done, (void)total;
  pthread_mutex_lock(&sy_lock);
  stops = sy_stops;
  pthread_mutex_unlock(&sy_lock);
  return stops;
}

static int sy_verify(uint32_t unused) {
  (void)unused;
  return nbdserve_cas_verify(sy_cas, sy_damaged, sy_progress, NULL);
}

/* Who removes a volume waits while a step of verify is in it, and not longer;
 * also if verify ends with that step. */
static void sy_verified(int stops) {
  struct sy_thread a = {.run = sy_verify};
  struct sy_thread b = {.run = sy_change, .arg = NBDSERVE_CAS_RM};
  uint64_t first, next;
  char was[200], is[200];
  sy_new("rm of a volume that is verified");
  first = sy_add("w");
  next = sy_add("x");
  sy_list(was);
  sy_set_bar(0, first, SY_BLOCK);
  sy_start(&a);
  sy_at_bar(&a);
  sy_list(is);
  if (strcmp(was, is)) sy_fail(is, 0); /* it counts as no client */
  sy_start(&b);
  if (sy_has_ended(&b, 50)) sy_fail("it does not wait", b.err);
  pthread_mutex_lock(&sy_lock);
  sy_stops = stops;
  pthread_mutex_unlock(&sy_lock);
  sy_set_bar(0, next, SY_BLOCK);
  if (!stops) sy_at_bar(&a);
  sy_ok("rm", sy_join(&b));
  sy_no_bar();
  if (sy_join(&a) != (stops ? -ECANCELED : 0)) sy_fail("verify", a.err);
  sy_stops = 0;
  sy_end();
}

static struct nbdserve_export sy_hidden; /* what is being filled */

static int sy_finish(uint32_t keep) {
  return nbdserve_cas_finish(sy_cas, &sy_hidden, (int)keep);
}

/* Who gives up a volume that was being filled waits until a checkpoint has
 * written its map. */
static void sy_given_up(void) {
  struct sy_thread a = {.run = sy_checkpoint}, b = {.run = sy_finish};
  unsigned char data[SY_BLOCK];
  uint64_t i;
  sy_new("a volume that is given up during a checkpoint");
  sy_limit = SY_SIZE;
  sy_ok("begin",
        nbdserve_cas_begin(sy_cas, "h", SY_WIDE * SY_BLOCK, &sy_hidden));
  for (i = 0; i < SY_WIDE; i += 4) { /* more than one portion of leaves */
    sy_fill(data, ++sy_last);
    sy_ok("write",
          sy_hidden.ops->write(sy_hidden.ctx, data, i * SY_BLOCK, SY_BLOCK, 0));
  }
  sy_set_bar(1, SY_DATA, SY_SIZE - SY_DATA);
  sy_start(&a);
  sy_at_bar(&a);
  sy_start(&b);
  if (sy_has_ended(&b, 50)) sy_fail("it does not wait", b.err);
  sy_no_bar();
  sy_ok("checkpoint", sy_join(&a));
  sy_ok("finish", sy_join(&b));
  sy_ok("checkpoint", sy_checkpoint(0));
  sy_check();
  sy_end();
}

static int sy_sync(uint32_t unused) {
  int err;
  (void)unused;
  os_lock(&sy_cas->lock);
  err = cas_sync(sy_cas, 1);
  cas_unlock(sy_cas);
  return err;
}

/* Before gc gives back what it has noted, others give some of that its space
 * again, and a sync begins. */
static int sy_beside_gc(void *arg, uint64_t done, uint64_t total) {
  struct sy_thread *t = arg;
  uint32_t x, n = 0;
  (void)total;
  if (done || t->arg++ != 1) return 0;
  os_lock(&sy_cas->lock);
  for (x = CAS_SEGMENT; x < sy_cas->nslots; x += CAS_SEGMENT) {
    if (cas_segment(sy_cas, x)->space != SPACE_UNKNOWN) continue;
    sy_ok("space", cas_give_space(sy_cas, x));
    n += cas_segment(sy_cas, x)->is_given;
  }
  cas_unlock(sy_cas);
  if (!n) sy_fail("nothing was noted", 0);
  sy_open(0);
  sy_start(t);
  if (!sy_held(t)) sy_fail("there was no sync", t->err);
  return 0;
}

/* What is given to a segment during a sync counts from the next one on. */
static void sy_given(void) {
  struct sy_thread a = {.run = sy_sync};
  enum cas_space space[2];
  uint32_t x;
  int i;
  sy_new("space that is given during a sync");
  sy_limit = SY_SIZE;
  sy_ok("write", sy_write(1));
  sy_open(0);
  sy_start(&a);
  if (!sy_held(&a)) sy_fail("there was no sync", a.err);
  os_lock(&sy_cas->lock);
  x = sy_cas->nslots;
  sy_ok("space", cas_give_space(sy_cas, x));
  cas_unlock(sy_cas);
  sy_open(-1);
  sy_ok("sync", sy_join(&a));
  for (i = 0; i < 2; i++) {
    os_lock(&sy_cas->lock);
    space[i] = cas_segment(sy_cas, x)->space;
    cas_unlock(sy_cas);
    sy_ok("sync", sy_sync(0));
  }
  if (space[0] != SPACE_WRITTEN) sy_fail("it counts too early", space[0]);
  if (space[1] != SPACE_DURABLE) sy_fail("it does not count", space[1]);
  sy_end();
}

/* A segment counts as having all its space only if it has: not when gc gave it
 * back while the sync ran that was to make it durable. */
static void sy_punched(void) {
  struct sy_thread a = {.run = sy_sync};
  uint64_t bytes;
  uint32_t x;
  int err;
  sy_new("gc while a sync runs");
  sy_limit = SY_SIZE;
  err = nbdserve_cas_gc(sy_cas, &bytes, sy_beside_gc, &a);
  if (err != -EOPNOTSUPP) { /* as in a POSIX build */
    sy_ok("gc", err);
    sy_open(-1);
    sy_ok("sync", sy_join(&a));
    os_lock(&sy_cas->lock);
    for (x = 1; x < sy_cas->nslots; x++)
      if (!CAS_AT(sy_cas, x, refs) &&
          cas_segment(sy_cas, x)->space == SPACE_DURABLE &&
          !memcmp(sy_medium + cas_digest_off(sy_cas, x), cas_given,
                  CAS_DIGEST_LEN))
        sy_fail("it counts, and after a cut it is given back", x);
    cas_unlock(sy_cas);
    sy_ok("sync", sy_sync(0));
  }
  os_lock(&sy_cas->lock);
  for (x = 0; x < sy_cas->nslots; x++)
    if (sy_hole[cas_data_off(sy_cas, x) / SY_BLOCK] &&
        cas_segment(sy_cas, x)->space == SPACE_DURABLE)
      sy_fail("a hole where there is to be space", x);
  cas_unlock(sy_cas);
  sy_end();
}

/* Gc gives back nothing behind the end that the superblock knows of: recovery
 * gives space to segments there one by one, and would come to none of those
 * that gc has kept. */
static void sy_behind(void) {
  uint64_t bytes;
  uint32_t x;
  int err;
  sy_new("gc of a store that grows by that");
  sy_limit = SY_SIZE;
  os_lock(&sy_cas->lock);
  while (sy_cas->npairs > 0)
    cas_take_pair(sy_cas);
  cas_unlock(sy_cas);
  err = nbdserve_cas_gc(sy_cas, &bytes, NULL, NULL);
  if (err != -EOPNOTSUPP) sy_ok("gc", err); /* as in a POSIX build */
  os_lock(&sy_cas->lock);
  x = (uint32_t)sy_cas->super.nslots;
  if (sy_cas->nslots - x < 2 * CAS_SEGMENT) sy_fail("it does not grow", x);
  for (; x < sy_cas->nslots; x += CAS_SEGMENT)
    if (cas_segment(sy_cas, x)->space != SPACE_DURABLE)
      sy_fail("it was given back", x);
  cas_unlock(sy_cas);
  sy_end();
}

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  snprintf(sy_path, sizeof sy_path, "%s", argv[1]);
  snprintf(sy_copy, sizeof sy_copy, "%s.cut", argv[1]);
  alarm(60);
  sy_durable();
  sy_counted();
  sy_dropped();
  sy_superblock();
  sy_joined();
  sy_reread();
  sy_retired();
  sy_portions(0);
  sy_portions(1);
  sy_overwritten();
  sy_logged();
  sy_parts(0);
  sy_parts(1);
  sy_staged(NBDSERVE_CAS_CREATE);
  sy_staged(NBDSERVE_CAS_RENAME);
  sy_staged(NBDSERVE_CAS_ROLLBACK);
  sy_staged(NBDSERVE_CAS_RM);
  sy_verified(0);
  sy_verified(1);
  sy_given_up();
  sy_given();
  sy_punched();
  sy_behind();
  return 0;
}

//== simulator mutate fault
#if !NBDSERVE_NO_CAS
/* ---- What must be true of a store whenever nothing is under way -----------
 *
 * cas_check walks all that is in memory and counts anew what the store counts:
 * a slip in these numbers shows in the step that makes it, and not in the lucky
 * history in which something is lost by it. */

#define CK(condition) ck_must(condition, #condition, __LINE__)

static struct {
  const struct cas_node **node; /* [room]: a hash table of all nodes, */
  int32_t *edges;               /* and how many edges lead to each */
  uint32_t room;
  uint32_t nnodes;
  int32_t *holds; /* [nslots]: those that were found on each slot */
  unsigned char *is_page, *is_listed; /* [nslots] */
  uint32_t nslots;                    /* that there is room for */
  uint32_t ndirty;
  uint32_t nleaves;
  int is_blind; /* a leaf is neither in memory nor to be read */
  uint32_t at;  /* what is looked at, for the message */
} ck;

static void ck_must(int is_true, const char *what, int line) {
  if (!is_true) ck_fail(what, line, ck.at);
}

static void ck_grow(void) {
  const struct cas_node **node = ck.node;
  int32_t *edges = ck.edges;
  uint32_t room = ck.room, i, k;
  ck.room = room ? 2 * room : 1024;
  ck.node = calloc(ck.room, sizeof *ck.node);
  ck.edges = calloc(ck.room, sizeof *ck.edges);
  for (i = 0; i < room; i++) {
    if (!node[i]) continue;
    for (k = (uint32_t)((uintptr_t)node[i] >> 4) % ck.room; ck.node[k];)
      k = (k + 1) % ck.room;
    ck.node[k] = node[i];
    ck.edges[k] = edges[i];
  }
  free(node);
  free(edges);
}

/* The count of edges to a node, 0 for one that was not met before */
static int32_t *ck_edges(const struct cas_node *node) {
  uint32_t k;
  if (2 * ck.nnodes >= ck.room) ck_grow();
  k = (uint32_t)((uintptr_t)node >> 4) % ck.room;
  while (ck.node[k] && ck.node[k] != node)
    k = (k + 1) % ck.room;
  ck.nnodes += !ck.node[k];
  ck.node[k] = node;
  return ck.edges + k;
}

/* One more hold on a slot that is to have data */
static void ck_block(struct nbdserve_cas *st, uint32_t slot) {
  if (!slot || slot == CAS_LOST) return;
  ck.at = slot;
  CK(slot < st->nslots);
  CK(CAS_AT(st, slot, refs) > 0);
  CK(CAS_AT(st, slot, tag) != TAG_PAGE && CAS_AT(st, slot, tag) != TAG_RETIRED);
  ck.holds[slot]++;
}

/* The page of a leaf that is not in memory, or NULL */
static const unsigned char *ck_page(struct nbdserve_cas *st, uint32_t slot) {
  static unsigned char page[65536];
  unsigned char sum[CAS_DIGEST_LEN];
  int i;
  for (i = 0; i < 2; i++, slot += CAS_TWIN)
    if (!ck_bytes(page, cas_data_off(st, slot), st->bs) &&
        cas_sum_page(st->hw, page, st->bs, sum))
      return page;
  return NULL;
}

static void ck_leaf(struct nbdserve_cas *st, const struct cas_node *leaf) {
  const unsigned char *page = NULL;
  uint32_t c, slot;
  CK(!leaf->nkids && !leaf->kid);
  if (leaf->slots) {
    ck.nleaves++;
    CK(leaf->at < st->nleaves && st->leaves[leaf->at] == leaf);
  } else {
    CK(leaf->slot != 0); /* what is dirty is in memory */
    page = ck_page(st, leaf->slot);
    ck.is_blind |= !page;
  }
  for (c = 0; c < st->fanout && (page || leaf->slots); c++) {
    slot = page ? u_get32(page + CAS_HEAD + 4 * c) : leaf->slots[c];
    ck_block(st, slot);
  }
}

/* Follows an edge to a node, and the first one to all below it.  above: its
 * parent. */
static void ck_node(struct nbdserve_cas *st, const struct cas_node *node,
                    int level, uint32_t index, const struct cas_node *above) {
  uint32_t c, i;
  ck.at = node->slot;
  CK(node->slot == CAS_LOST || (node->level == level && node->index == index));
  CK(node->slot || !above || !above->slot); /* dirty below what is clean */
  CK(level < CAS_LEVELS || node->refs == 1);
  if ((*ck_edges(node))++) return;
  CK(!node->is_given);
  if (node->slot == CAS_LOST) {
    CK(level < CAS_LEVELS && !node->nkids && !node->slots);
    return;
  }
  ck.ndirty += !node->slot;
  if (node->slot) CK(node->slot % CAS_SEGMENT < CAS_TWIN);
  for (i = 0; node->slot && i < 2; i++) {
    ck.at = node->slot + i * CAS_TWIN;
    CK(ck.at < st->nslots && !ck.is_page[ck.at]);
    CK(CAS_AT(st, ck.at, tag) == TAG_PAGE);
    ck.is_page[ck.at] = 1;
    ck.holds[ck.at]++;
  }
  if (!level) ck_leaf(st, node);
  for (c = 0; c < node->nkids; c++) {
    if (!node->kid[c]) continue;
    if (level == CAS_LEVELS) {
      i = index * st->per_page + c / 2;
      CK(c < 2 * st->per_page && i < st->places && st->by_place[i]);
    }
    ck_node(st, node->kid[c], level - 1,
            level == CAS_LEVELS ? 0 : index * st->fanout + c, node);
  }
}

/* The list of volumes, their places and names */
static void ck_volumes(struct nbdserve_cas *st, int is_forged) {
  uint32_t n = st->nvolumes, at, i, place, id = 0;
  CK(n <= st->volume_room);
  for (at = 0; at < n; at++) {
    const struct cas_volume *vol = st->volumes[at], *other;
    const struct cas_record *facts = &vol->now;
    struct cas_node *node;
    ck.at = vol->id;
    CK(vol->st == st && vol->id > id && vol->id < st->next_id);
    id = vol->id;
    CK(vol->place < st->places && st->by_place[vol->place] == vol);
    place = vol->place / st->per_page;
    node = cas_kid(st->catalog, place / st->fanout);
    CK(node && vol->page == cas_kid(node, place % st->fanout));
    CK(!vol->is_staged && !vol->edge && !vol->was);
    CK((facts->flags == CAS_IS_SNAPSHOT) == (vol->parent != NULL));
    CK(vol->then.id == facts->id && vol->then.size == facts->size);
    CK(vol->then.flags == facts->flags && !strcmp(vol->then.name, facts->name));
    CK(!vol->pins && (facts->id == vol->id || !facts->id));
    CK(facts->id || vol->clients == 1);
    CK(cas_is_size(st, facts->size));
    CK(facts->flags == CAS_IS_PARTIAL
           ? cas_is_id(facts->name, CAS_PARTIAL) || !facts->id
           : cas_is_name(facts->name) || (!facts->id && !*facts->name));
    if (!is_forged && u_is_zero(facts->cid, CAS_DIGEST_LEN))
      CK(!*cas_digests(vol));
    CK(is_forged || u_is_zero(facts->cid, CAS_DIGEST_LEN) || vol->parent);
    if (vol->parent) CK(!vol->parent->parent && facts->id);
    if (vol->parent) CK(facts->made_from == vol->parent->id);
    for (i = 0; !is_forged && i < at && *facts->name; i++) {
      other = st->volumes[i];
      CK(other->parent != vol->parent || strcmp(other->now.name, facts->name));
    }
    for (i = 0; vol->parent && i < n && st->volumes[i] != vol->parent;)
      i++;
    CK(i < n);
  }
  for (place = 0; place < st->places; place++)
    n -= st->by_place[place] != NULL;
  CK(n == 0);
}

static void ck_list(struct nbdserve_cas *st, uint32_t slot, int is_data,
                    uint32_t *n) {
  for (; slot; slot = CAS_AT(st, slot, link), ++*n) {
    ck.at = slot;
    CK(slot < st->nslots && !ck.is_listed[slot]);
    CK(CAS_AT(st, slot, refs) == CAS_PENDING);
    CK(!is_data || CAS_AT(st, slot, tag) == TAG_NONE); /* (C5, C6) */
    ck.is_listed[slot] = 1;
  }
}

/* Every slot is in one state, and is held as often as it says. */
static void ck_slots(struct nbdserve_cas *st, int is_lenient) {
  uint32_t slot, n = 0;
  ck_list(st, st->dropped, 1, &n);
  ck_list(st, st->retired, 0, &n);
  CK(n == st->nwaiting || st->failed); /* a sync that failed keeps its list */
  CK(CAS_AT(st, 0, refs) == 1 && CAS_AT(st, 0, tag) == TAG_NONE);
  for (slot = 1; slot < st->nslots; slot++) {
    int32_t refs = CAS_AT(st, slot, refs), holds = ck.holds[slot];
    uint32_t tag = CAS_AT(st, slot, tag);
    ck.at = slot;
    CK(refs >= CAS_PENDING);
    CK(refs > 0 || (!holds && !(tag & (CAS_GOOD | TAG_INDEXED))));
    CK(refs <= 0 || refs == holds || (is_lenient && refs > holds));
    CK(refs != 0 || tag == TAG_NONE);
    CK(refs == CAS_PENDING || tag != TAG_RETIRED);
    CK(tag == TAG_NONE || tag == TAG_PAGE || tag == TAG_RETIRED ||
       tag & (CAS_GOOD | TAG_INDEXED));
    CK((tag == TAG_PAGE) == ck.is_page[slot] || is_lenient);
    CK((refs == CAS_PENDING) == ck.is_listed[slot] ||
       ((st->log_unwritten || st->failed) && !ck.is_listed[slot]));
  }
}

/* The index has just those that say so, in the buckets where they are looked
 * for. */
static void ck_index(struct nbdserve_cas *st) {
  uint32_t n = st->ngroups * CAS_SLOTS, b, slot, nfound = 0;
  CK(st->mask < n && n <= 2 * (st->mask + 1));
  CK(!(st->mask & (st->mask + 1)));
  for (b = 0; b < n; b++)
    for (slot = CAS_AT(st, b, bucket); slot; slot = CAS_AT(st, slot, link)) {
      ck.at = slot;
      CK(slot < st->nslots && CAS_AT(st, slot, tag) & TAG_INDEXED);
      CK(cas_bucket(st, CAS_AT(st, slot, tag)) == &CAS_AT(st, b, bucket));
      CK(nfound++ < st->nslots);
    }
  for (slot = 0; slot < st->nslots; slot++)
    nfound -= (CAS_AT(st, slot, tag) & TAG_INDEXED) != 0;
  CK(nfound == 0);
}

/* What is free in segments and in all, and where cursors are */
static void ck_space(struct nbdserve_cas *st) {
  uint32_t nfree = 0, npairs = 0, npending = 0, x, i;
  CK(st->nslots % CAS_SEGMENT == 0 && st->nslots <= st->ngroups * CAS_SLOTS);
  CK(st->nslots > (st->ngroups - 1) * CAS_SLOTS);
  for (x = 0; x < st->nslots; x += CAS_SEGMENT) {
    const struct cas_segment *seg = cas_segment(st, x);
    uint32_t free = 0, pairs = 0, pages = 0;
    for (i = x; i < x + CAS_SEGMENT; i++) {
      free += CAS_AT(st, i, refs) == 0;
      pages += CAS_AT(st, i, tag) == TAG_PAGE;
      pairs += i - x < CAS_TWIN && CAS_AT(st, i, refs) == 0 &&
               CAS_AT(st, i + CAS_TWIN, refs) == 0;
    }
    ck.at = x;
    CK(seg->nfree == free && seg->npairs == pairs && seg->npages == pages);
    CK(seg->space <= SPACE_BROKEN);
    CK(st->syncing || seg->space != SPACE_SYNCING || st->failed);
    CK(st->gives_back || seg->space != SPACE_BUSY);
    if (seg->space > SPACE_DURABLE) continue;
    nfree += free;
    if (seg->space == SPACE_DURABLE) npairs += pairs;
    if (seg->space == SPACE_WRITTEN || seg->space == SPACE_SYNCING)
      npending += pairs;
  }
  CK(st->nfree == nfree && st->nfree >= 2 * st->npairs);
  CK(st->npairs == npairs && st->npending == npending);
  CK(st->data_cursor <= st->nslots && st->back_cursor <= st->nslots);
  CK(st->back_cursor % CAS_SEGMENT == 0 && st->pair_cursor % CAS_SEGMENT == 0);
  CK(st->pair_cursor < st->nslots);
}

static void ck_log(struct nbdserve_cas *st) {
  uint32_t i;
  ck.at = st->nlog;
  CK(st->nlog < CAS_ENTRIES && st->nwritten <= st->nlog);
  CK(st->nwritten == st->nlog || st->failed); /* (C3) */
  CK(st->super.replay <= st->seq);
  CK(st->seq - st->super.replay < st->super.log_pages || st->readonly);
  CK(st->readonly || (st->marked <= st->durable && st->durable <= st->seq));
  for (i = st->nlog * CAS_ENTRY; i < CAS_LOG_HEAD; i++)
    CK(!st->page[i] || st->readonly);
  CK(st->last_number >= st->super.number);
  CK(st->super.nslots <= st->nslots && st->super.next_id <= st->next_id);
  CK(st->filled < st->to_fill + CAS_FILL && st->to_fill <= st->nslots);
  CK(!st->catalog || !st->catalog->slot || st->failed ||
     st->super.catalog == st->catalog->slot);
}

/* how, bits: CK_LENIENT: memory or a page could not be had, so holds may be
 * left over; CK_FORGED: names and records may be as no store makes them. */
static void cas_check(struct nbdserve_cas *st, int how) {
  uint32_t i;
  os_lock(&st->ckpt);
  os_lock(&st->lock);
  CK(st->is_open && !st->is_replaying && !st->is_ending && !st->loader);
  ck.ndirty = ck.nleaves = ck.nnodes = 0;
  ck.is_blind = 0;
  for (i = 0; i < ck.room; i++) {
    ck.node[i] = NULL;
    ck.edges[i] = 0;
  }
  if (ck.nslots < st->nslots) {
    free(ck.holds);
    free(ck.is_page);
    free(ck.is_listed);
    ck.nslots = st->nslots;
    ck.holds = malloc(ck.nslots * sizeof *ck.holds);
    ck.is_page = malloc(ck.nslots);
    ck.is_listed = malloc(ck.nslots);
  }
  memset(ck.holds, 0, st->nslots * sizeof *ck.holds);
  memset(ck.is_page, 0, st->nslots);
  memset(ck.is_listed, 0, st->nslots);
  if (st->catalog) ck_node(st, st->catalog, CAS_TOP, 0, NULL);
  for (i = 0; i < ck.room; i++) {
    if (!ck.node[i]) continue;
    ck.at = ck.node[i]->slot;
    CK(ck.node[i]->refs == ck.edges[i]); /* (C13) */
  }
  ck.at = ck.ndirty;
  CK(st->ndirty == ck.ndirty);
  CK(st->nleaves == ck.nleaves && st->nleaves <= st->leaf_room);
  ck_volumes(st, how & CK_FORGED);
  ck_slots(st, how & CK_LENIENT || ck.is_blind);
  ck_index(st);
  ck_space(st);
  ck_log(st);
  os_unlock(&st->lock);
  os_unlock(&st->ckpt);
}
#endif

//== fuzz
/* Defends "broken clients" against everything a client may send: no input ends
 * or hangs the process or gets at memory that is not its own.  So what a peer
 * says to a pull, or to a repair.
 *
 * What a client sends, to a server in this process (libFuzzer, or AFL++ with
 * its driver): the handshake and all that follows.  The last byte chooses the
 * number of workers, and what the empty name means; or, from 0xe0 on, that it
 * is what a peer says. */
#include <unistd.h>
#define fdatasync(fd) ((void)(fd), 0) /* no power is cut */
#define NBDSERVE_NO_MAIN 1
#include "nbdserve.c"

enum {
  Z_SIZE = 65536
};
static unsigned char z_disk[Z_SIZE];
static struct nbdserve_cas *z_store;
static const char *z_default;
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

static int z_read(void *ctx, void *buf, uint64_t off, uint64_t len,
                  uint32_t flags) {
  (void)flags;
  assert(len > 0 && off + len <= Z_SIZE && off % 512 == 0 && len % 512 == 0);
  memcpy(buf, (unsigned char *)ctx + off, (size_t)len);
  return off == 4096 ? -EIO : 0;
}

static int z_write(void *ctx, const void *buf, uint64_t off, uint64_t len,
                   uint32_t flags) {
  (void)flags;
  assert(len > 0 && off + len <= Z_SIZE && off % 512 == 0 && len % 512 == 0);
  memcpy((unsigned char *)ctx + off, buf, (size_t)len);
  return 0;
}

/* Exports: "file", "temp", "ram" a host's backend, and a store's "v" and its
 * snapshot "v@s" */
static int z_find(void *ctx, const char *name, struct nbdserve_export *e) {
  static const struct nbdserve_ops ops = {.read = z_read, .write = z_write};
  struct nbdserve_flat temp = {.flags = NBDSERVE_FLAT_TEMPORARY};
  (void)ctx;
  if (!*name) name = z_default;
  if (*name == 'v') return nbdserve_cas_volume(z_store, name, e);
  if (*name == 'f') return nbdserve_flat_open("mem:64K", NULL, e);
  if (*name == 't') return nbdserve_flat_open("mem:64K", &temp, e);
  e->size = Z_SIZE;
  e->min_block = 512;
  e->ops = &ops;
  e->ctx = z_disk;
  return strcmp(name, "ram") == 0 ? 0 : -ENOENT;
}

static int z_list(void *ctx, int (*emit)(void *, const char *, const char *),
                  void *arg) {
  (void)ctx;
  return emit(arg, "ram", "a host's") || emit(arg, "v", NULL);
}

static void z_log(void *ctx, int level, const char *message) {
  (void)ctx, (void)level;
  assert(strlen(message) > 0);
}

static void z_open_store(void) {
  struct nbdserve_cas_options o = {.log_pages = 64};
  char path[] = "/tmp/fuzzXXXXXX";
  struct nbdserve_export e = {0};
  int err;
  close(mkstemp(path));
  unlink(path);
  err = nbdserve_cas_init(path, &o);
  if (!err) err = nbdserve_cas_open(path, NULL, &z_store);
  unlink(path);
  if (!err) err = nbdserve_cas_create(z_store, "v", Z_SIZE);
  if (!err) err = nbdserve_cas_volume(z_store, "v", &e);
  if (!err) err = e.ops->write(e.ctx, "snapshot", 5000, 8, 0);
  if (!err) e.ops->close(e.ctx);
  if (!err) err = nbdserve_cas_snapshot(z_store, "v@s");
  if (err) abort();
}

#if !NBDSERVE_NO_CAS && !NBDSERVE_NO_CLIENT
/* ---- What a peer says ------------------------------------------------------
 * The last byte chooses what it is said to, and how it is made: see z_peer. */

static void far_sum(const void *p, size_t n, unsigned char sum[32]) {
  static int hw = -1;
  if (hw < 0) hw = os_has_hwsha();
  sha_256(hw, p, NULL, n, sum, NULL);
}

enum {
  Z_BLOCKS = 21,
  Z_FAR = Z_BLOCKS * 4096 - 100 /* bytes of what the peer has */
};
static off_t z_rots; /* where the data of block 0 of "x" lies */

static void z_ask(struct far_talk *t, int command, uint64_t cookie,
                  uint64_t off, uint64_t len) {
  unsigned char h[28 + 8192] = {0};
  far_put(h, 4, 0x25609513);
  far_put(h + 6, 2, (uint64_t)command);
  far_put(h + 8, 8, cookie);
  far_put(h + 16, 8, off);
  far_put(h + 24, 4, len);
  if (command == 1) memcpy(h + 28, far_node(t->far, 0, 0), 32);
  far_hear(t, h, command == 1 ? sizeof h : 28);
}

/* What an honest peer says to a pull, or to a repair, of all of that */
static void z_say(struct far_talk *t, const struct far *far, int repairs) {
  unsigned char go[4 + 16 + 4 + 7 + 4] = {0};
  int k;
  memset(t, 0, sizeof *t);
  far_begin(t, far);
  memcpy(go + 4, "IHAVEOPT", 8);
  far_put(go + 12, 4, 7);
  far_put(go + 16, 4, sizeof go - 20);
  far_put(go + 20, 4, 7);
  memcpy(go + 24, repairs ? "/blocks" : "ab/pull", 7);
  far_hear(t, go, sizeof go - 1);
  far_hear(t, go, 1);
  if (repairs) {
    z_ask(t, 1, 0, 0, 8192);
    z_ask(t, 0, 0, 8192, 4096);
    return;
  }
  z_ask(t, 0, 0, 0, 4096);
  for (k = 4; k-- > 0;)
    z_ask(t, 0, 0, far->at[k], 4096);
  z_ask(t, 0, 0, far->data, Z_BLOCKS * 4096);
}

/* Changes bytes of p[0..n): each 4 of data say where, and by what. */
static void z_patch(unsigned char *p, uint64_t n, const unsigned char *data,
                    size_t size) {
  for (; size >= 4 && n; data += 4, size -= 4)
    p[far_get(data, 3) % n] ^= data[3];
}

/* Nothing is left of a pull that failed but parts of volumes, which can be
 * removed; one that ended has the id of its contents. */
static int z_removes(void *arg, const struct nbdserve_cas_info *info) {
  (void)arg;
  if (strncmp(info->name, "sha256-", 7) != 0) return 0;
  if (nbdserve_cas_rm(z_store, info->name)) abort();
  return 0;
}
static void z_pulled(int err) {
  struct nbdserve_export e = {0};
  struct far is;
  char id[72];
  int there = nbdserve_cas_volume(z_store, "p@s", &e);
  if (there != (err ? -ENOENT : 0)) abort();
  if (!err) {
    far_make(&is, 4096, 1016, e.size);
    if (e.size && e.ops->read(e.ctx, is.b + is.data, 0, e.size, 0)) abort();
    e.ops->close(e.ctx);
    far_seal(&is);
    if (nbdserve_cas_seal(z_store, "p@s", id, NULL, NULL)) abort();
    if (strcmp(id, is.id) != 0) abort();
    far_free(&is);
    if (nbdserve_cas_rm(z_store, "p@s") || nbdserve_cas_rm(z_store, "p"))
      abort();
  }
  if (nbdserve_cas_list(z_store, z_removes, NULL)) abort();
}

/* A repair leaves what was there, or what should have been. */
static void z_repaired(int err) {
  unsigned char b[4096], want[4096];
  struct nbdserve_export e = {0};
  if (nbdserve_cas_volume(z_store, "x", &e)) abort();
  int bad = e.ops->read(e.ctx, b, 0, 4096, 0);
  memset(want, 'x', sizeof want);
  if (bad && bad != -EIO) abort();
  if (!bad && err && b[9] == 'y') b[9] = 'x'; /* nobody has looked at it yet */
  if (!bad && memcmp(b, want, 4096) != 0) abort();
  if (!err && bad) abort();
  e.ops->close(e.ctx);
  if (pwrite(z_store->fd, want, 4096, z_rots) != 4096) abort();
}

/* Finds where the data of "x" lies. */
static void z_find_slot(void) {
  struct nbdserve_export e = {0};
  struct cas_spot spot;
  unsigned char b[4096];
  memset(b, 'x', sizeof b);
  if (nbdserve_cas_create(z_store, "x", 4096)) abort();
  if (nbdserve_cas_volume(z_store, "x", &e)) abort();
  if (e.ops->write(e.ctx, b, 0, 4096, 0)) abort();
  os_lock(&z_store->lock);
  if (cas_find_spot(z_store, cas_root(e.ctx), 0, &spot)) abort();
  os_unlock(&z_store->lock);
  z_rots = (off_t)cas_data_off(z_store, spot.slot);
  e.ops->close(e.ctx);
}

/* bit 0: to a repair; else to a pull.  bits 1, 2: 0: what it says is data; 1:
 * data are changes of what an honest one would say; 2: of what it has, and the
 * tree is computed anew above that; 3: of the tree, from level bit 3, 4 on */
static int z_peer(const unsigned char *data, size_t size, unsigned last) {
  struct far far;
  struct far_talk t;
  int in = os_nameless_file(NULL), out = open("/dev/null", O_WRONLY), err;
  int repairs = last & 1, how = last >> 1 & 3;
  uint64_t i;
  if (!z_rots) z_find_slot();
  far_make(&far, 4096, 1016, Z_FAR);
  for (i = 0; i < Z_FAR; i++)
    far.b[far.data + i] = (unsigned char)(repairs ? 'x' : 1 + i / 4096 % 17);
  if (how == 2) z_patch(far.b + far.data, far.end - far.data, data, size);
  far_seal(&far);
  i = last >> 3 & 3;
  if (how == 3)
    z_patch(far_node(&far, (int)i, 0), 32 * far.count[i], data, size);
  if (how == 3) far_raise(&far, (int)i);
  z_say(&t, &far, repairs);
  if (how == 1) z_patch(t.out, t.nout, data, size);
  if (how == 1 && size % 4 == 3) t.nout = far_get(data + size - 3, 3) % t.nout;
  if (in < 0 || out < 0) abort();
  if (write(in, how ? t.out : data, how ? t.nout : size) < 0) abort();
  lseek(in, 0, SEEK_SET);
  if (repairs) {
    if (pwrite(z_store->fd, "y", 1, z_rots + 9) != 1) abort();
    err = nbdserve_cas_repair(z_store, FAR_PEER(in, out), NULL, NULL, NULL);
    z_repaired(err);
  } else {
    err = nbdserve_cas_pull(z_store, "p@s", "ab", FAR_PEER(in, out));
    z_pulled(err);
  }
  close(in);
  close(out);
  free(t.out);
  far_free(&far);
  return 0;
}
#endif

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
  static const char *const names[] = {"file", "ram", "v", "temp"};
  int in = os_nameless_file(NULL), out = open("/dev/null", O_WRONLY);
  unsigned last = size ? data[size - 1] : 0;
  struct nbdserve_config config = {.version = NBDSERVE_VERSION_NUMBER,
                                   .find = z_find,
                                   .list = z_list,
                                   .threads = last & 16 ? 4 : 1,
                                   .log = z_log,
                                   .log_level = NBDSERVE_LOG_TRACE};
  struct nbdserve *s;
  if (!z_store) z_open_store();
#if !NBDSERVE_NO_CAS && !NBDSERVE_NO_CLIENT
  if (last >= 0xe0) {
    close(in);
    close(out);
    return z_peer(data, size - 1, last);
  }
#endif
  z_default = names[last & 3];
  if (in < 0 || out < 0 || write(in, data, size) != (ssize_t)size) abort();
  lseek(in, 0, SEEK_SET);
  if (nbdserve_new(&s, &config)) abort();
  nbdserve_serve(s, in, out, NULL);
  nbdserve_free(s);
  close(in);
  close(out);
  return 0;
}

//== bench
/* Defends "numbers": the table of requests a second is made with it.
 *
 * bench SOCKET EXPORT COMMAND BYTES DEPTH CONNECTIONS MS: keeps DEPTH requests
 * in flight on each connection and prints how many were answered a second.
 * SOCKET: a path, or 127.0.0.1 with a port.
 * COMMAND: read, write, sequential (reads) or flush (after each write). */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/un.h>

struct b_load {
  struct t_conn c;
  const char *command;
  uint64_t bytes, answered, next, seed;
  int depth, ms;
  unsigned char *in;
};

static double b_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Sends n requests in one call */
static void b_send(struct b_load *l, int n) {
  static unsigned char payload[1 << 20];
  unsigned char head[64][28];
  struct iovec v[128], *p = v;
  uint64_t blocks = l->c.size / l->bytes, i, at;
  size_t len = 0;
  CHECK(n <= 64 && l->bytes <= sizeof payload);
  memset(v, 0, sizeof v);
  for (i = 0; i < (uint64_t)n; i++) {
    int flush = *l->command == 'f' && l->next % 2;
    int write = !flush && strchr("wf", *l->command) != NULL;
    l->seed = l->seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
    t_put(head[i], 4, 0x25609513);
    t_put(head[i] + 4, 4, flush ? 3 : write);
    t_put(head[i] + 8, 8, l->next);
    t_put(head[i] + 16, 8,
          flush ? 0
                : l->bytes * (*l->command == 's' ? l->next % blocks
                                                 : (l->seed >> 33) % blocks));
    t_put(head[i] + 24, 4, flush ? 0 : l->bytes);
    l->next++;
    p->iov_base = head[i];
    len += p++->iov_len = 28;
    p->iov_base = payload;
    /* No two blocks of 4 KiB are the same, here or before. */
    for (at = 0; write && at < l->bytes; at += 4096) {
      memcpy(payload + at, &l->seed, 8);
      payload[at + 8] = (unsigned char)(at >> 12);
    }
    if (write) len += p++->iov_len = (size_t)l->bytes;
  }
  for (n = (int)(p - v), p = v; len > 0;) {
    ssize_t done = writev(l->c.fd, p, n);
    CHECK(done > 0);
    len -= (size_t)done;
    for (; n > 0 && (size_t)done >= p->iov_len; p++, n--)
      done -= (ssize_t)p->iov_len;
    if (n > 0) p->iov_base = (char *)p->iov_base + done;
    if (n > 0) p->iov_len -= (size_t)done;
  }
}

static void *b_run(void *arg) {
  struct b_load *l = arg;
  int reads = strchr("rs", *l->command) != NULL, due = l->depth;
  uint64_t reply = 16 + (reads ? l->bytes : 0), got = 0, done = 0;
  double end = b_now() + l->ms / 1000.0;
  while (due || done < l->next) { /* at last none is in flight */
    ssize_t n;
    if (due) b_send(l, due);
    CHECK((n = read(l->c.fd, l->in, 1 << 20)) > 0);
    if (got % reply == 0 && n >= 8) CHECK(t_get(l->in + 4, 4) == 0);
    got += (uint64_t)n;
    due = (int)(got / reply - done);
    done += (uint64_t)due;
    if (b_now() > end)
      due = 0;
    else
      l->answered = done;
  }
  t_close(&l->c);
  return NULL;
}

int main(int argc, char **argv) {
  struct sockaddr_un a = {0};
  struct sockaddr_in in = {0};
  const char *colon = argc == 8 ? strrchr(argv[1], ':') : NULL;
  struct b_load l[16] = {{{0, 0, 0, 0, 0}, 0, 0, 0, 0, 0, 0, 0, 0}};
  pthread_t t[16];
  double start, sum = 0;
  int i, n = argc == 8 ? atoi(argv[6]) : 0;
  CHECK(n > 0 && n <= 16 && strlen(argv[1]) < sizeof a.sun_path);
  a.sun_family = AF_UNIX;
  strcpy(a.sun_path, argv[1]);
  in.sin_family = AF_INET;
  in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  in.sin_port = htons((uint16_t)(colon ? atoi(colon + 1) : 0));
  for (i = 0; i < n; i++) {
    int one = 1, fd = socket(colon ? AF_INET : AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    if (colon)
      CHECK(!connect(fd, (struct sockaddr *)&in, sizeof in));
    else
      CHECK(!connect(fd, (struct sockaddr *)&a, sizeof a));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    CHECK(t_open(&l[i].c, fd, argv[2], 0) == 0);
    l[i].command = argv[3];
    l[i].bytes = strtoull(argv[4], NULL, 10);
    l[i].depth = atoi(argv[5]);
    l[i].ms = atoi(argv[7]);
    l[i].seed = (uint64_t)i + 1;
    CHECK((l[i].in = malloc(1 << 20)) != NULL);
  }
  start = b_now();
  for (i = 0; i < n; i++)
    CHECK(!pthread_create(&t[i], NULL, b_run, &l[i]));
  for (i = 0; i < n; i++)
    CHECK(!pthread_join(t[i], NULL));
  for (i = 0; i < n; i++)
    sum += (double)l[i].answered;
  printf("%.0f\n", sum / (b_now() - start));
  return 0;
}
