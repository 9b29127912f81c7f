#!/bin/sh
# Runs in mmdebstrap when all packages are installed; $1 is the new root.
set -eu

# The boot loader, as grub-install would make it: an image for the gap behind the
# partition table that reads /boot/grub/grub.cfg on the first partition of the
# disk it was started from.
mkdir -p "$1/boot/grub/i386-pc"
chroot "$1" grub-mkimage --format=i386-pc --prefix='(,msdos1)/boot/grub' \
	--output=/boot/grub/i386-pc/core.img biosdisk part_msdos ext2 normal linux
cp "$1/usr/lib/grub/i386-pc/boot.img" "$1/boot/grub/i386-pc/boot.img"
chroot "$1" apt-get -q -y autoremove --purge grub-pc-bin

# Only ssh.socket listens.
chroot "$1" systemctl disable ssh.service

# It has an initramfs made by dracut at shutdown, which no disk of a node needs.
chroot "$1" systemctl disable mdadm-shutdown.service
