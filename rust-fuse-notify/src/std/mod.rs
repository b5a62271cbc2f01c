// SPDX-License-Identifier: GPL-2.0
//! What the author of a FUSE server uses.
