// SPDX-License-Identifier: GPL-3.0-or-later
// A PCI host bridge with one GPU on it that has a configuration space and nothing behind it, so that the kernel, udev and
// drivers meet a device of NVIDIA's on a machine without one. It computes nothing.
#include <linux/device.h>
#include <linux/err.h>
#include <linux/module.h>
#include <linux/pci.h>

#define CAPABILITY 0x40

static unsigned int device_id = 0x2330;
module_param(device_id, uint, 0444);
MODULE_PARM_DESC(device_id, "PCI device ID of the GPU (default: H100 SXM5)");

static struct device *parent;
static struct pci_bus *bus;
static struct pci_sysdata sysdata = { .domain = 1, .node = NUMA_NO_NODE };
static u8 space[PCI_CFG_SPACE_EXP_SIZE];

static int gpu_read(struct pci_bus *from, unsigned int devfn, int where, int size, u32 *value)
{
	*value = ~0;
	if (from->number || devfn || where + size > sizeof(space))
		return PCIBIOS_DEVICE_NOT_FOUND;
	*value = 0;
	memcpy(value, space + where, size);
	return PCIBIOS_SUCCESSFUL;
}

static int gpu_write(struct pci_bus *to, unsigned int devfn, int where, int size, u32 value)
{
	// Only the command register keeps what is written; there are no base addresses.
	if (!to->number && !devfn && where == PCI_COMMAND && size == 2)
		memcpy(space + where, &value, size);
	return PCIBIOS_SUCCESSFUL;
}

static struct pci_ops ops = { .read = gpu_read, .write = gpu_write };

static void put(int where, int size, u32 value)
{
	memcpy(space + where, &value, size);
}

static int __init onprem_gpu_init(void)
{
	LIST_HEAD(resources);

	put(PCI_VENDOR_ID, 2, PCI_VENDOR_ID_NVIDIA);
	put(PCI_DEVICE_ID, 2, device_id);
	put(PCI_STATUS, 2, PCI_STATUS_CAP_LIST);
	put(PCI_CLASS_DEVICE, 2, PCI_CLASS_DISPLAY_3D);
	put(PCI_CAPABILITY_LIST, 1, CAPABILITY);
	put(CAPABILITY, 1, PCI_CAP_ID_EXP);
	put(CAPABILITY + PCI_EXP_FLAGS, 2, 2);
	put(CAPABILITY + PCI_EXP_LNKCAP, 4, PCI_EXP_LNKCAP_SLS_32_0GB | 16 << 4);
	put(CAPABILITY + PCI_EXP_LNKCAP2, 4, PCI_EXP_LNKCAP2_SLS_32_0GB);
	put(CAPABILITY + PCI_EXP_LNKSTA, 2, PCI_EXP_LNKCAP_SLS_32_0GB | 16 << 4);

	parent = root_device_register("onprem_gpu");
	if (IS_ERR(parent))
		return PTR_ERR(parent);
	bus = pci_create_root_bus(parent, 0, &ops, &sysdata, &resources);
	if (!bus) {
		root_device_unregister(parent);
		return -ENODEV;
	}
	pci_scan_child_bus(bus);
	pci_bus_add_devices(bus);
	return 0;
}
module_init(onprem_gpu_init);

MODULE_DESCRIPTION("A GPU that is only a PCI configuration space");
MODULE_LICENSE("GPL");
