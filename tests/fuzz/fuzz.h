/* fuzz.h - what every fuzzer begins with: the server itself, a log that is
 * written and thrown away, and with -DFUZZ_REPLAY a main that replays files.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef FUZZ_H
#define FUZZ_H

#define COLLABD_NO_MAIN
#include "../../collabd.c"

#undef NDEBUG
#include <assert.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
int LLVMFuzzerInitialize(int *argc, char ***argv);

/* In place of libc's: log lines are put together and nobody hears them. */
void
syslog(int priority, const char *format, ...)
{
    char line[1024];
    va_list args;

    (void)priority;
    va_start(args, format);
    (void)vsnprintf(line, sizeof line, format, args);
    va_end(args);
}

static void
fuzz_quiet(void)
{
    log_to_syslog = true;
    log_limit = LOG_LEVEL_DEBUG;
}

#ifdef FUZZ_REPLAY
int
main(int argc, char *argv[])
{
    (void)LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        uint8_t *text, *exact;
        size_t len;
        if (f == NULL) {
            perror(argv[i]);
            return 1;
        }
        text = malloc(1 << 20);
        len = fread(text, 1, 1 << 20, f);
        (void)fclose(f);
        exact = malloc(len + (len == 0)); /* its end is the end */
        memcpy(exact, text, len);
        free(text);
        (void)LLVMFuzzerTestOneInput(exact, len);
        free(exact);
    }
    (void)printf("%d files replayed\n", argc - 1);
    return 0;
}
#endif

#endif
