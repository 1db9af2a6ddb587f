/* A token file, any bytes: it is read without a stumble, and every line that
 * was taken gives at least its right on its own pattern.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fuzz.h"

static const uint8_t *text;
static size_t text_at, text_len;

static int
fake_openat(int folder, const char *name, int flags, ...)
{
    (void)folder, (void)name, (void)flags;
    text_at = 0;
    return 1000;
}

static ssize_t
fake_read(int fd, void *to, size_t len)
{
    size_t n = text_len - text_at < len ? text_len - text_at : len;

    (void)fd;
    if (n > 1)
        n = n / 2; /* it may come in parts */
    if (n > 0)
        memcpy(to, text + text_at, n);
    text_at += n;
    return (ssize_t)n;
}

static int
fake_close(int fd)
{
    (void)fd;
    return 0;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_quiet();
    sys.openat = fake_openat;
    sys.read = fake_read;
    sys.close = fake_close;
    return 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct tokens tokens;
    static const uint8_t none[16];
    bool good, known;

    text = data;
    text_len = len;
    good = access_load(&tokens, (struct sys_file){ -1, "tokens" }, "tokens");
    assert(tokens.on && tokens.count <= COLLABD_TOKENS);
    assert(!good || len <= ACCESS_TOKEN_FILE_MAX);
    for (unsigned i = 0; i < tokens.count; i++) {
        const struct token *t = &tokens.token[i];
        struct span pattern = span_of(t->pattern, t->pattern_len);
        enum access_right right;
        assert(t->right >= RIGHT_READ && t->right <= RIGHT_ADMIN);
        assert(t->pattern_len <= sizeof t->pattern);
        assert(span_is(pattern, "*") || span_starts(pattern, "ws/") ||
               span_starts(pattern, "doc/"));
        right = access_judge(&tokens, t->hash, pattern, &known);
        if (access_same(t->hash, none, 16))
            assert(right == RIGHT_NONE && !known);
        else
            assert(known && right >= t->right);
        (void)access_judge(&tokens, t->hash, span_text("ws/notes"), &known);
    }
    assert(access_judge(&tokens, none, span_text("ws/notes"), &known) ==
           RIGHT_NONE);
    return 0;
}
