/* A configuration file, and behind a line "%%" one flag or value a line: what
 * is taken lies in its range, and a server could be measured with it.
 *
 * SPDX-License-Identifier: MIT
 */
#include "fuzz.h"

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    fuzz_quiet();
    return 0;
}

static void
check_list(const struct cfg *c, const struct cfg_list *list, enum cfg_kind kind)
{
    assert(list->count <= sizeof list->item / sizeof *list->item);
    for (unsigned i = 0; i < list->count; i++) {
        const char *text = cfg_item(c, list, i);
        assert(list->item[i] + strlen(text) < c->store_used);
        assert(*text != '\0');
        assert(cfg_judge_element(kind, span_text(text)) == NULL);
    }
}

static void
check(struct cfg *c)
{
    assert(c->store_used >= 1 && c->store_used <= sizeof c->store);
    assert(c->store[0] == '\0' && c->store[c->store_used - 1] == '\0');
    for (size_t i = 0; i < CFG_COUNT; i++) {
        const struct cfg_setting *set = &cfg_settings[i];
        void *field = cfg_field(c, set);
        uint64_t n;
        if (cfg_is_list(set)) {
            check_list(c, field, set->kind);
            continue;
        }
        if (set->kind == CFG_TEXT) {
            assert(*(uint16_t *)field < c->store_used);
            continue;
        }
        n = *(uint64_t *)field;
        if (set->kind == CFG_FLAG)
            assert(n <= 1);
        else if (set->kind == CFG_CHOICE)
            assert(n < 4);
        else
            assert(n >= (uint64_t)set->least && n <= (uint64_t)set->most);
        if (set->kind == CFG_POWER)
            assert((n & (n - 1)) == 0);
        assert(cfg_agrees(c, c, set));
    }
}

static void
use(struct cfg *c)
{
    static struct cfg other;
    const struct http h = { .origins = 1,
                            .origin = span_text("https://a.example:1"),
                            .host = span_text("b.example") };
    uint8_t peer[16] = { 0 };

    assert(memory_sum(c) > 0 && memory_sum(c) < UINT64_C(1) << 60);
    assert(c->message_memory >= 2 * c->max_message);
    assert(c->dead_after > c->ping_interval);
    assert(c->listen.count + c->tls_listen.count > 0);
    (void)access_is_trusted(c, peer, true);
    (void)access_is_trusted(c, peer, false);
    (void)access_host_is_ours(c, "box", span_text("b.example"));
    (void)access_origin(c, &h);
    other = *c;
    cfg_defaults(c);
    cfg_keep_start(&other, c);
    check(c);
}

/* Each line of the text is a word of the command line. */
static bool
read_flags(struct cfg *c, struct span text)
{
    char *words = calloc(1, span_len(text) + 1), *argv[42] = { "collabd" };
    enum cfg_action action = CFG_ACTION_NONE;
    const char *operand[2] = { NULL, NULL };
    int argc = 1;
    bool good;

    if (!span_is_empty(text))
        memcpy(words, text.at, span_len(text));
    for (char *w = strtok(words, "\n"); w != NULL && argc < 41;
         w = strtok(NULL, "\n"))
        argv[argc++] = w;
    (void)cfg_path(argc, argv);
    good = cfg_flags(c, argc, argv, &action, operand);
    assert(action < CFG_ACTION_COUNT);
    free(words);
    return good;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct cfg c;
    struct span text = span_of(data, len), flags = { NULL, NULL };
    const uint8_t *border = len < 4 ? NULL : memmem(data, len, "\n%%\n", 4);
    bool good;

    if (border != NULL) {
        text.end = border + 1;
        flags = (struct span){ border + 4, data + len };
    }
    cfg_defaults(&c);
    check(&c);
    good = cfg_lines(&c, text, "file");
    check(&c);
    good &= read_flags(&c, flags);
    check(&c);
    if (cfg_settle(&c) && good)
        use(&c);
    return 0;
}
