#!/bin/sh
# Makes the root file system of the node image, as root in namespaces of its own:
# the tree is in a tmpfs that is gone with them, whatever happens.
#
# assemble.sh TREE BASE ROOTFS STAGE DISK OFFSET SIZE UUID [DEB...]
#   TREE    empty directory to mount the tmpfs on
#   BASE    tar of the Debian system
#   ROOTFS  overlay that mirrors /
#   STAGE   directory whose files go to /usr/lib/tkenode
#   DISK    file that the ext4 file system of SIZE is written into, at OFFSET;
#           boot.img and core.img of the boot loader are put beside it
set -eu
umask 022 # files of the node are not the user's, nor are their modes
tree=$1 base=$2 rootfs=$3 stage=$4 disk=$5 offset=$6 size=$7 uuid=$8
shift 8

mount -t tmpfs -o mode=0755,size=90% tmpfs "$tree"
# Device nodes cannot be made without root, and devtmpfs hides them anyway.
tar -C "$tree" --numeric-owner --exclude='./dev/*' -xf "$base"

# What git knows of a file is its content and whether it can be executed. Links of
# the merged /usr and the modes of directories stay as Debian has them.
tar -C "$rootfs" --owner=0 --group=0 --mode=u=rwX,go=rX -cf - . |
	tar -C "$tree" --no-overwrite-dir --keep-directory-symlink -xf -
mkdir -p "$tree/usr/lib/tkenode" "$tree/opt/cni/bin"
cp -rL --no-preserve=ownership "$stage/." "$tree/usr/lib/tkenode/"

if [ $# -gt 0 ]; then
	: >"$tree/dev/null"
	mount --bind /dev/null "$tree/dev/null"
	mkdir "$tree/tmp/deb"
	cp "$@" "$tree/tmp/deb/"
	chroot "$tree" sh -c 'DEBIAN_FRONTEND=noninteractive dpkg --force-unsafe-io -i /tmp/deb/*'
	umount "$tree/dev/null"
	rm -r "$tree/dev/null" "$tree/tmp/deb"
fi

# Nothing two nodes must not share, and nothing of this machine. An empty machine
# id gets set at boot; a missing one would also apply all presets.
: >"$tree/etc/machine-id"
rm -rf "$tree/etc/hostname" "$tree"/etc/ssh/ssh_host_* "$tree"/var/lib/systemd/random-seed \
	"$tree"/var/lib/cloud "$tree"/var/lib/dbus/machine-id "$tree"/var/log/* \
	"$tree"/var/lib/apt/lists/* "$tree"/etc/*- "$tree"/root/.[!.]*
install -d -m 2755 -g "$(sed -n 's/^systemd-journal:x:\([0-9]*\):.*/\1/p' "$tree/etc/group")" "$tree/var/log/journal"
echo localhost >"$tree/etc/hostname"
# The image is as new as its /usr: no hwdb, catalog or ld.so.cache at first boot.
touch -r "$tree/usr" "$tree/etc/.updated" "$tree/var/.updated"

cp "$tree/boot/grub/i386-pc/boot.img" "$tree/boot/grub/i386-pc/core.img" "$(dirname "$disk")/"
# The file is all zeros, so no kernel has to zero inode tables after the boot.
mke2fs -q -t ext4 -d "$tree" -L tkenode -U "$uuid" \
	-E "offset=$offset,hash_seed=$uuid,assume_storage_prezeroed=1" "$disk" "$size"
