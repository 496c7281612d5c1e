// SPDX-License-Identifier: GPL-3.0-or-later
// A second module that needs the first one, as NVIDIA's does.
#include <linux/module.h>

void nvidia_is_there(void);

static int __init uvm_init(void)
{
	nvidia_is_there();
	return 0;
}
module_init(uvm_init);

static void __exit uvm_exit(void)
{
}
module_exit(uvm_exit);

MODULE_VERSION(VERSION);
MODULE_LICENSE("Dual MIT/GPL");
