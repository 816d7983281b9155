/* SPDX-License-Identifier: Apache-2.0 */
/* What an ARM microcontroller does before main: its vectors, and its floating-point unit. */
#include <stdint.h>
extern void _start(void);
void reset(void);
__attribute__((section(".vectors"), used)) const uintptr_t vectors[] = { STACK_TOP, (uintptr_t)reset };
void reset(void)
{
#if defined(__ARM_FP)
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit */
#endif
    _start();
}
