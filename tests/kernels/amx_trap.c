// AMX instructions on a processor without them: each raises SIGILL, and the handler does what Intel's manual says. Held
// apart from csrc/cpu/matrix_unit.h on purpose: the arithmetic here is the processor's own with DAZ and FTZ set.
// Anything that the manual makes a fault, or that is not decoded here, ends the process.
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { CONFIG, RELEASE, ZERO, LOAD, STORE, DOT, KINDS };
static long counts[KINDS];

static __thread struct {
    int configured, rows[8], bytes[8];
    uint8_t data[8][16][64];
} tiles;

static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void fault(const char *what) {
    (void)!write(2, what, strlen(what));
    (void)!write(2, "\n", 1);
    signal(SIGABRT, SIG_DFL);
    raise(SIGABRT);
    _exit(134);
}

static void configure(const uint8_t *m) {
    memset(&tiles, 0, sizeof tiles);
    if (m[0] != 1 || m[1] != 0) fault("ldtilecfg: palette or start row");
    for (int i = 2; i < 16; ++i) {
        if (m[i]) fault("ldtilecfg: reserved bytes");
    }
    for (int t = 0; t < 16; ++t) {
        int bytes = m[16 + 2 * t] | m[17 + 2 * t] << 8, rows = m[48 + t];
        if (t >= 8 && (bytes || rows)) fault("ldtilecfg: a ninth tile");
        if (bytes > 64 || rows > 16 || !bytes != !rows) fault("ldtilecfg: shape");
        if (t < 8) tiles.bytes[t] = bytes, tiles.rows[t] = rows;
    }
    tiles.configured = 1;
}

static float number(const uint8_t *pair, int odd) {
    uint32_t bits = (uint32_t)(pair[2 * odd] | pair[2 * odd + 1] << 8) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void dot(int c, int a, int b) {
    if (c == a || c == b || a == b) fault("tdpbf16ps: one register twice");
    if (tiles.bytes[c] % 4 || tiles.bytes[a] % 4 || tiles.bytes[b] % 4) fault("tdpbf16ps: half a pair");
    if (tiles.rows[c] != tiles.rows[a] || tiles.bytes[c] != tiles.bytes[b] || tiles.bytes[a] / 4 != tiles.rows[b]) {
        fault("tdpbf16ps: shapes");
    }
    for (int m = 0; m < tiles.rows[c]; ++m) {
        for (int n = 0; n < tiles.bytes[c] / 4; ++n) {
            volatile float even = 0, odd = 0, was;  // volatile: as written, each result rounded and flushed
            for (int k = 0; k < tiles.bytes[a] / 4; ++k) {
                even = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(number(&tiles.data[a][m][4 * k], 0)),
                                                  _mm_set_ss(number(&tiles.data[b][k][4 * n], 0)), _mm_set_ss(even)));
                odd = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(number(&tiles.data[a][m][4 * k], 1)),
                                                 _mm_set_ss(number(&tiles.data[b][k][4 * n], 1)), _mm_set_ss(odd)));
            }
            memcpy((void *)&was, &tiles.data[c][m][4 * n], 4);
            volatile float sum = even + odd;
            volatile float result = was + sum;
            memcpy(&tiles.data[c][m][4 * n], (const void *)&result, 4);
        }
    }
}

static void on_illegal(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number, (void)info;
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)reg[REG_RIP];
    _mm_setcsr(0x9fc0);  // DAZ, FTZ, nothing trapped, to nearest; sigreturn restores what was
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) fault("SIGILL: no VEX instruction of map 0F38");
    const int R = !(at[1] & 0x80), X = !(at[1] & 0x40), B = !(at[1] & 0x20);
    const int W = at[2] >> 7, vvvv = ~at[2] >> 3 & 15, L = at[2] >> 2 & 1, pp = at[2] & 3;
    const int op = at[3], mod = at[4] >> 6, tile = at[4] >> 3 & 7, rm = at[4] & 7;
    if (W || L || R) fault("SIGILL: not an AMX instruction");

    int length = 5;
    uint8_t *address = NULL;
    int64_t stride = 0;
    int has_sib = 0;
    if (mod != 3) {
        int base = rm;
        if (rm == 4) {
            const int sib = at[length++], index = (sib >> 3 & 7) | X << 3;
            has_sib = 1;
            base = sib & 7;
            stride = index == 4 ? 0 : reg[registers[index]] << (sib >> 6);
        }
        if (base == 5 && mod == 0) fault("SIGILL: an address without a base is not decoded");
        address = (uint8_t *)reg[registers[base | B << 3]];
        int32_t shift = 0;
        if (mod == 1) shift = (int8_t)at[length], length += 1;
        if (mod == 2) memcpy(&shift, at + length, 4), length += 4;
        address += shift;
    }

    if (op == 0x49 && pp == 0 && mod != 3 && tile == 0) {
        ++counts[CONFIG];
        configure(address);
    } else if (op == 0x49 && pp == 0 && at[4] == 0xc0) {
        ++counts[RELEASE];
        memset(&tiles, 0, sizeof tiles);
    } else if (!tiles.configured) {
        fault("SIGILL: tiles are not configured");
    } else if (op == 0x49 && pp == 3 && mod == 3 && rm == 0) {
        ++counts[ZERO];
        memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    } else if (op == 0x4b && pp == 3 && has_sib) {
        ++counts[LOAD];
        memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
        for (int r = 0; r < tiles.rows[tile]; ++r) memcpy(tiles.data[tile][r], address + r * stride, tiles.bytes[tile]);
    } else if (op == 0x4b && pp == 2 && has_sib) {
        ++counts[STORE];
        for (int r = 0; r < tiles.rows[tile]; ++r) memcpy(address + r * stride, tiles.data[tile][r], tiles.bytes[tile]);
    } else if (op == 0x5c && pp == 2 && mod == 3 && !B && vvvv < 8) {
        ++counts[DOT];
        dot(tile, rm, vvvv);
    } else {
        fault("SIGILL: an instruction that is not decoded");
    }
    reg[REG_RIP] += length;
}

void amx_trap(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, NULL);
}

// How many instructions of a kind were trapped: ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps.
long amx_trapped(int kind) { return counts[kind]; }
