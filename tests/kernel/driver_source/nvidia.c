// SPDX-License-Identifier: GPL-3.0-or-later
// What the kernel and the roles see of NVIDIA's driver: its name, its version, the devices that it binds. It computes nothing.
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

static struct proc_dir_entry *folder;

static int version_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "NVRM version: NVIDIA UNIX " FLAVOUR "  " VERSION "  Release Build\n");
	return 0;
}

static int nvidia_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	return 0;
}

static const struct pci_device_id devices[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_NVIDIA, PCI_ANY_ID), .class = PCI_CLASS_DISPLAY_3D << 8, .class_mask = ~0 },
	{ }
};
MODULE_DEVICE_TABLE(pci, devices);

static struct pci_driver driver = { .name = "nvidia", .id_table = devices, .probe = nvidia_probe };

static int __init nvidia_init(void)
{
	folder = proc_mkdir("driver/nvidia", NULL);
	if (!folder)
		return -ENOMEM;
	proc_create_single("version", 0444, folder, version_show);
	return pci_register_driver(&driver);
}
module_init(nvidia_init);

static void __exit nvidia_exit(void)
{
	pci_unregister_driver(&driver);
	proc_remove(folder);
}
module_exit(nvidia_exit);

void nvidia_is_there(void)
{
}
EXPORT_SYMBOL(nvidia_is_there);

MODULE_VERSION(VERSION);
MODULE_LICENSE("Dual MIT/GPL");
